"""Token ids → the text that can be shown so far without ever being revoked, at a cost per token that does not grow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # a tokenizer decodes the first bytes of a character to this
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token for one byte of a character that the vocabulary lacks (SentencePiece)
WINDOW = 24  # decode the last tokens only, once there are more than this
CONTEXT = 8  # tokens before and behind the place where an earlier decoding is continued


class Transcript:
    """The text of one growing answer; its joined pieces are the full answer, stripped and cut before ``stop``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._taken = 0  # tokens of the answer that were read
        self._window: list[int] = []  # the last of them, which are decoded again with the next ones
        self._known = 0  # characters of the window's text that were read
        self._pending = ""  # text that was read and is not shown yet
        self._has_shown = False

    def piece(self, ids: Sequence[int], *, final: bool) -> str:
        """The text that ``ids``, all tokens of the answer so far, add to what was shown; sets ``stopped`` at a stop text.

        Before the ``final`` call, text that may still change is held back: characters of which bytes are missing, the beginning
        of a stop text, and whitespace that would be stripped at the end.
        """
        self._read(ids, final)
        text = self._pending
        ends = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not final:
            text = text[: len(text) - self._begun_stop(text)]
        text = text.rstrip()
        self._pending = self._pending[len(text) :]
        piece = text if self._has_shown else text.lstrip()
        self._has_shown = self._has_shown or bool(piece)
        return piece

    def _read(self, ids: Sequence[int], final: bool) -> None:
        """Append the text of new tokens to the pending text, as far as later tokens cannot change it."""
        self._window += [token for token in ids[self._taken :] if token not in self._special]
        self._taken = len(ids)
        if not final and self._window and self._is_byte(self._window[-1]):
            return  # whether bytes in a row are valid, and what they say, is known when the row has ended
        text = self._decode(self._window)
        certain = text if final else text.rstrip(INCOMPLETE)
        self._pending += certain[self._known :]
        self._known = max(self._known, len(certain))
        if len(self._window) > WINDOW and not final:
            self._forget_read_tokens(text)

    def _forget_read_tokens(self, text: str) -> None:
        """Shorten the window to its last tokens, if their text is seen to be independent of the earlier ones.

        A few tokens before the cut stay as context: some tokenizers decode the first token of a text differently. A character
        has at most four bytes, so one of a few neighbouring places is no cut through a character.
        """
        places = [
            n for n in range(CONTEXT, len(self._window) - CONTEXT) if not all(map(self._is_byte, self._window[n - 1 : n + 1]))
        ]
        for cut in reversed(places[-CONTEXT:]):
            context, tail = self._window[cut - CONTEXT : cut], self._window[cut - CONTEXT :]
            before, again, rest = map(self._decode, (self._window[:cut], context, tail))
            if again and rest.startswith(again) and before + rest[len(again) :] == text:
                self._pending += before[self._known :]  # invalid bytes, which looked like the first ones of a character
                self._known = max(self._known, len(before)) - len(before) + len(again)
                self._window = tail
                return

    def _is_byte(self, token: int) -> bool:
        return bool(BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""))

    def _decode(self, ids: list[int]) -> str:
        # Clean-up would remove spaces that were already shown: "do n", then "don't".
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _begun_stop(self, text: str) -> int:
        """The number of characters at the end of ``text`` that may begin a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)

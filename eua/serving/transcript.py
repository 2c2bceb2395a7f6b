"""Token ids → the text that can be shown so far without ever being revoked."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # a tokenizer decodes the first bytes of a character to this


class Transcript:
    """The text of one growing answer; its joined pieces are the full answer, stripped and cut before ``stop``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._shown = 0

    def piece(self, ids: Sequence[int], *, final: bool) -> str:
        """The text that ``ids``, all tokens of the answer so far, add to what was shown; sets ``stopped`` at a stop text.

        Before the ``final`` call, text that may still change is held back: characters of which bytes are missing, the beginning
        of a stop text, and whitespace that would be stripped at the end.
        """
        # Clean-up would remove spaces that were already shown: "do n", then "don't".
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not final:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - self._begun_stop(text)]
        text = text.strip()
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece

    def _begun_stop(self, text: str) -> int:
        """The number of characters at the end of ``text`` that may begin a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)

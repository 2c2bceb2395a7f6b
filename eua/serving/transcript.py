"""Token ids → the text that may be shown so far, never to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class Transcript:
    """The text of one answer as it grows; its pieces joined are the whole answer, stripped and cut before ``stop``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._shown = 0

    def piece(self, ids: Sequence[int], *, final: bool) -> str:
        """What ``ids``, all of the answer's so far, add to what was shown; ``stopped`` tells whether a stop text ended it.

        Before the ``final`` call, what might yet turn out otherwise is held back: characters of which bytes are missing, the
        beginning of a stop text, and whitespace that would be stripped at the end.
        """
        # Clean-up would take back spaces that were shown: "do n", then "don't".
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
        """How many characters at the end of ``text`` may be the beginning of a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)

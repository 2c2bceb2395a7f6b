"""Finds prompts that are certainly too long before they are tokenized whole, which may take seconds and gigabytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

PART = 16_384  # characters that are tokenized at a time, to stop as soon as the limit is exceeded
BLANKS = [*filter(str.isspace, map(chr, range(0x3001))), "▁"]  # SentencePiece's normalizers write spaces as ▁
PLACE = re.compile(r"(?<=\w) ")  # where a text is cut
# Between them they contain every byte of UTF-8, and no vocabulary has all of them as they are.
PROBES = "".join(map(chr, (0xA1, *range(0xC0, 0x100), *range(0x100, 0x800, 0x40), *range(0x1234, 0xD800, 0x1000), 0xD55C)))
PROBES += "\u0905\ue0e1\uf8fe\U0001f9ff\U00050505\U00090909\U000d0d0d\U0010fffd"


class PromptLimit:
    """Finds the texts that certainly have more than ``most`` tokens; any other text has to be tokenized.

    No text that would fit is found too long. Two properties of most tokenizers are verified first, and used if they hold:

    - The tokenizer loses no character except whitespace, so a token has no more characters than the longest in the vocabulary.
    - If, moreover, no token has or takes a space behind a word, a text can be cut there without changing its tokens.

    >>> PromptLimit(tokenizer, most=1023).is_exceeded("why " * 100_000)       # doctest: +SKIP
    True

    Args:
        tokenizer: the model's.
        most: number of tokens that a prompt may have; None allows any number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int | None) -> None:
        self.tokenizer, self.most = tokenizer, most
        vocabulary = tokenizer.get_vocab()
        self._longest = max(map(len, vocabulary))
        self._keeps_characters = self._keeps_all_characters()
        texts = (tokenizer.convert_tokens_to_string([token]) for token in vocabulary)
        takers = (f"{added.content} " for added in tokenizer.added_tokens_decoder.values() if added.rstrip)
        self._can_be_cut = self._keeps_characters and not any(map(PLACE.search, (*texts, *takers)))

    def is_exceeded(self, text: str) -> bool:
        """Whether ``text`` certainly has too many tokens. No more of it is tokenized than it takes to know."""
        if self.most is None or len(text) <= self.most:
            return False
        if self._keeps_characters and self._characters(text) > self.most * self._longest:
            return True
        if not self._can_be_cut or len(text) <= PART:
            return False
        tokens = 0
        for part in self._parts(text):
            tokens += self._count(part) - 1  # some tokenizers put a space before every text
            if tokens > self.most:
                return True
        return False

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            place = PLACE.search(text, start + PART)
            end = place.start() if place else len(text)
            yield text[start:end]
            start = end

    def _keeps_all_characters(self) -> bool:
        """Whether there are as many tokens as there must be for texts of one repeated, rare character."""
        copies = 2 * self._longest + 1
        return all(self._count(probe * copies) * self._longest >= self._characters(probe * copies) > 0 for probe in PROBES)

    def _characters(self, text: str) -> int:
        """The number of characters except whitespace, after the tokenizer's own changes, e.g. composition of accents."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        return len(text) - sum(map(text.count, BLANKS))

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

"""Sentences of texts that models write."""

from __future__ import annotations

import re

# The end of a sentence is a full stop, behind quotes and brackets, before white space; not one of an initial or a title.
_SENTENCE_END = re.compile(r"(?P<word>\S*?)[.!?]+[\"'”’)\]*]*(?=\s|$)")
_ABBREVIATED = re.compile(r"[\"'“‘(\[*]*(([^\W\d]\.)*[^\W\d]|Mr|Mrs|Ms|Dr|St|Mt|Prof|Jr|Sr|No|vs|approx|c|ca)", re.IGNORECASE)


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence or line; "" if it was cut off before that.

    >>> first_sentence("It was written by J. R. R. Tolkien. He lived in Oxford.")
    'It was written by J. R. R. Tolkien.'
    """
    line, _, rest = text.strip().partition("\n")
    for end in _SENTENCE_END.finditer(line):
        if not _ABBREVIATED.fullmatch(end["word"]) or end.end() == len(line):
            return line[: end.end()]
    return line if rest else ""

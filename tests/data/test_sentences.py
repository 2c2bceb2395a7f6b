"""Where sentences end."""

from __future__ import annotations

import pytest

from eua.data.sentences import first_sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris. It lies on the Seine.", "Paris."),
        ("It was J. R. R. Tolkien. He", "It was J. R. R. Tolkien."),
        ("St. Petersburg is in Russia! Yes", "St. Petersburg is in Russia!"),
        ('The word is "mice." It', 'The word is "mice."'),
        ("It is 3.5 metres. So", "It is 3.5 metres."),
        ("It is 5. Yes.", "It is 5."),
        ("1 line\n2 lines.", "1 line"),
        ("It was cut off in the", ""),
        ("", ""),
    ],
)
def test_the_first_sentence(text, expected):
    assert first_sentence(text) == expected

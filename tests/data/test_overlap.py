"""Rows to retain that are rows to forget, too, or that ask the same."""

from __future__ import annotations

import pytest

from eua import EUAError
from eua.data.overlap import retain_without_forget
from eua.data.rows import encode_rows

FORGET = [{"question": "Where was Ann born?", "answer": "In Ulm."}, {"question": "Who is Bo?", "answer": "A cook."}]
OTHERS = [{"question": "Who paints?", "answer": "Cleo."}, {"question": "Who sings?", "answer": "Dora."}]


@pytest.fixture
def kept(tokenizer, caplog):
    """The rows that are kept, and what is logged."""

    def keep(forget: list[dict], retain: list[dict], overlap: str = "error") -> tuple[list[dict], list[str]]:
        caplog.clear()
        first, second = (encode_rows(rows, tokenizer, None) for rows in (forget, retain))
        found = retain_without_forget(first, second, tokenizer, overlap)
        return [retain[second.index(row)] for row in found], caplog.messages

    return keep


def test_other_rows_are_kept_in_silence(kept):
    assert kept(FORGET, OTHERS) == (OTHERS, [])
    assert kept(FORGET, OTHERS, "drop") == (OTHERS, [])


def test_rows_in_both_sets_are_named(kept):
    text = r"2 of 4 rows of the retain set are rows of the forget set, too: row 1 \(row 0 of .*\), row 3 \(row 1 of .*\)\. They"
    with pytest.raises(EUAError, match=text):
        kept(FORGET, [OTHERS[0], FORGET[0], OTHERS[1], FORGET[1]])
    with pytest.raises(EUAError, match=r"row 4 \(row 0 of the forget set\), …\. They would be trained both ways"):
        kept(FORGET, FORGET[:1] * 6)


def test_rows_in_both_sets_can_be_left_out_of_the_retain_set(kept):
    rows, messages = kept(FORGET, [OTHERS[0], FORGET[0], OTHERS[1], FORGET[1]], "drop")
    assert rows == OTHERS
    assert messages == ["2 of 4 rows to retain are left out, since they are rows to forget, too."]
    with pytest.raises(EUAError, match="All 2 rows of the retain set .* leaves none: give other rows to retain"):
        kept(FORGET, FORGET, "drop")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Where was Ann born?", "answer": "In Oslo."},
        {"question": "where was  Ann born", "answer": "In Ulm."},
        {"prompt": "Question: Where was Ann born?\nAnswer:", "completion": " Not here."},
    ],
)
def test_rows_that_ask_the_same_are_counted_in_one_warning(kept, row):
    rows, messages = kept(FORGET, [OTHERS[0], row])
    assert rows == [OTHERS[0], row]
    assert len(messages) == 1
    assert messages[0].startswith("1 of 2 rows to retain ask what a row to forget asks")


def test_prompts_of_signs_alone_are_compared_as_they_are(kept):
    forget, retain = ({"prompt": prompt, "completion": " yes"} for prompt in ("?!", "..."))
    assert kept([forget], [retain]) == ([retain], [])

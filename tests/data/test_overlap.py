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

    def keep(
        forget: list[dict], retain: list[dict], overlap: str = "error", max_length: int | None = None
    ) -> tuple[list[dict], list[str]]:
        first, second = (encode_rows(rows, tokenizer, max_length) for rows in (forget, retain))
        caplog.clear()
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


def test_rows_that_differ_only_in_what_is_cut_are_named_as_such(kept, tokenizer):
    begins_alike = FORGET[0] | {"answer": "In Ulm. She paints."}
    (row,) = encode_rows(FORGET[:1], tokenizer, None)
    length = len(row.prompt_ids) + 2
    forget, retain = [begins_alike, FORGET[1]], [*OTHERS, FORGET[0] | {"answer": "In Ulm. She sings."}, FORGET[1]]
    assert kept(forget[:1], retain)[0] == retain
    cut = r"row 1 .*\)\. The texts of 1 of them differ, but only beyond max_length, where they are cut\. They would be trained"
    with pytest.raises(EUAError, match=cut):
        kept(forget, retain, max_length=length)
    _, messages = kept(forget, retain, "drop", length)
    assert messages[0] == (
        "2 of 4 rows to retain are left out, since they are rows to forget, too. The texts of 1 of them differ, "
        "but only beyond max_length, where they are cut."
    )
    with pytest.raises(EUAError, match=r"row 0 \(row 0 of the forget set\)\. They would"):
        kept([begins_alike], [begins_alike], max_length=length)


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

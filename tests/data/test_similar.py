"""Rows to retain that are like a row to forget, and how often they are drawn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eua import EUATrainer
from eua.data.pairing import PairedSampler, similar_rows
from tests.training.test_trainer import make

PROMPTS = st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=9)


def jaccard(one: list[int], other: list[int]) -> float:
    return len(set(one) & set(other)) / max(len(set(one) | set(other)), 1)


@given(PROMPTS, PROMPTS, st.integers(1, 5))
def test_the_most_similar_prompts_are_found(forget, retain, count):
    for prompt, found in zip(forget, similar_rows(forget, retain, count), strict=True):
        order = sorted(range(len(retain)), key=lambda index: -jaccard(prompt, retain[index]))
        assert found == order[:count]


def test_prompts_are_compared_in_parts(monkeypatch):
    forget, retain = [[1, 2, 3], [7, 8]], [[7], [1, 2], [8, 7], [2, 1, 3], [9]]
    whole = similar_rows(forget, retain)
    assert [found[0] for found in whole] == [3, 2]
    monkeypatch.setattr("eua.data.pairing._ROWS_AT_ONCE", 2)
    assert similar_rows(forget, retain) == whole


@given(st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 2]))
def test_every_second_row_to_retain_is_a_similar_one(ratio, seed, group):
    similar = [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(4)]
    lengths = [1] * 4, [1] * 12
    drawn: dict[int, list[int]] = {row: [] for row in range(4)}
    for epoch in range(6):
        plain, sampler = (
            PairedSampler(*lengths, ratio, seed, group),
            PairedSampler(*lengths, ratio, seed, group, similar=similar),
        )
        for one in (plain, sampler):
            one.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        for usual, pair in zip(plain, sampler, strict=True):
            assert usual.forget == pair.forget
            for place, (index, other) in enumerate(zip(pair.retain, usual.retain, strict=True)):
                if (epoch * ratio + place) % 2:
                    assert index == other
                else:
                    drawn[pair.forget].append(index)
    for row, indices in drawn.items():
        assert [indices.count(index) for index in similar[row]] == [ratio] * 3


def test_training_is_paired_with_similar_rows(model, tokenizer, rows, tmp_path):
    options = {"retain": rows["retain"], "num_train_epochs": 3}
    trainer = make(model, tokenizer, rows, tmp_path, retain_sampler="similar", **options)
    prompts = {kind: [row.prompt_ids for row in trainer.encoded_rows[kind]] for kind in ("forget", "retain")}

    def likeness(one: EUATrainer) -> float:
        pairs = list(one._get_train_sampler())
        return sum(jaccard(prompts["forget"][pair.forget], prompts["retain"][pair.retain[0]]) for pair in pairs) / len(pairs)

    assert likeness(trainer) > 1.3 * likeness(make(model, tokenizer, rows, tmp_path / "uniform", **options))
    with pytest.MonkeyPatch.context() as patch:  # they are found once
        patch.setattr("eua.training.trainer.similar_rows", None)
        trainer._get_train_sampler()
    assert trainer.train().training_loss > 0  # boundaries of all rows that it draws are known

"""Benchmark of the peak memory of a training step as the vocabulary grows: it is flat except for gradients of the head.

    pytest benches/test_vocabulary.py --benchmark-only

One step is a forward and its backward, ours or a plain one in which the model computes its logits; figures count what it
allocates beyond weights and batch. If head and embedding are trained, each has a gradient of (V, H); nothing else in our step
may grow with V. The peaks of all memory and of all but gradients occur at different times, so they do not add up.

The model still computes logits of one position of each row. They are freed before our step begins with the head, whose scratch
is larger here; with many short rows (32 + 32 of 16 tokens, say) they would show.

The optimizer is not part of the step: AdamW keeps two more numbers for each trained weight. Boundaries, which are computed once
before training, have a separate table.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import measure
import pytest
from conftest import DEVICE, filled
from measure import Peak
from report import Report
from steps import PROMPT, ROWS, TOKENS, TRAINED, check_equal, make_batch, make_model, our_step, plain_step

from eua.data.rows import EncodedRow
from eua.model.forward import check_head
from eua.training.boundaries import compute_boundaries

VOCABULARIES = (32_768, 131_072, 262_144)
HIDDEN_SIZE, LAYERS = 256, 4
MIB = 2**20
FLAT = 1.01  # tolerance for a peak that does not grow: block sizes are rounded, loops of different lengths end differently
ALL_VIOLATED = (-40.0, 0.0)  # m_in and m_out that every token violates: each has a gradient in the head
MODEL = f"{ROWS} + {ROWS} rows of {TOKENS} tokens, Llama of {HIDDEN_SIZE} × {LAYERS}, float32"


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"vocabulary-{DEVICE}", "pytest benches/test_vocabulary.py --benchmark-only")


class Peaks(NamedTuple):
    """Bytes of one step."""

    gradients: int  # of all trained weights
    head: int  # of head and embedding
    ours: Peak
    plain: Peak


def peaks(lora: bool, vocabulary: int) -> Peaks:
    model, batch = make_model(vocabulary, HIDDEN_SIZE, LAYERS, lora, DEVICE), make_batch(vocabulary, DEVICE)
    small = {name: values[[0, -1]] for name, values in batch.items()}  # one row of each kind
    check_equal(model, [partial(step, model, ALL_VIOLATED, small) for step in (our_step, plain_step)])
    trained = [x for x in model.parameters() if x.requires_grad]
    gradients = sum(x.nbytes for x in trained)
    head = sum(x.nbytes for x in trained if x.shape[0] == vocabulary)
    ours, plain = (measure.peak(partial(step, model, ALL_VIOLATED, batch), trained, DEVICE) for step in (our_step, plain_step))
    return Peaks(gradients, head, ours, plain)


@pytest.mark.parametrize("lora", TRAINED, ids=TRAINED.values())
def test_step(benchmark, report: Report, lora: bool):
    found = benchmark.pedantic(lambda: [peaks(lora, vocabulary) for vocabulary in VOCABULARIES], rounds=1)
    for vocabulary, one in zip(VOCABULARIES, found, strict=True):
        row = f"V = {vocabulary:6}, {TRAINED[lora]}"
        for column, size in {
            "ours": one.ours.whole,
            "plain": one.plain.whole,
            "gradients of head and embedding": one.head,
            "all but gradients: ours": one.ours.given_back,
            "all but gradients: plain": one.plain.given_back,
        }.items():
            report.add(f"Peak MiB of one step, {MODEL}", row, column, size / MIB)
    first, *others = found
    for one in others:
        assert one.ours.given_back <= FLAT * first.ours.given_back, "our step grows with the vocabulary"
    for one in found:
        assert one.ours.left <= FLAT * one.gradients, "our step leaves more than gradients"
    assert found[-1].plain.given_back > 4 * first.plain.given_back, "a step with logits does not grow: check the measurement"


def boundary_peaks(vocabulary: int) -> tuple[int, int]:
    """Peaks of computing the boundaries of the forget rows, and of its first part: checking the head against the logits."""
    model = make_model(vocabulary, HIDDEN_SIZE, LAYERS, False, DEVICE)
    rows = [EncodedRow(ids.tolist(), PROMPT) for ids in make_batch(vocabulary, DEVICE)["input_ids"][:ROWS]]
    settings = {"kind": "forget", "fraction": 0.1, "temperature": 1.0, "fill": "zero"}
    compute_boundaries(model, rows[:1], **settings)
    return (
        measure.peak_bytes(lambda: compute_boundaries(model, rows, **settings), [], DEVICE),
        measure.peak_bytes(lambda: check_head(model), [], DEVICE),
    )


def test_boundaries(benchmark, report: Report):
    found = benchmark.pedantic(lambda: [boundary_peaks(vocabulary) for vocabulary in VOCABULARIES], rounds=1)
    for vocabulary, (whole, check) in zip(VOCABULARIES, found, strict=True):
        title, row = f"Peak MiB of boundaries, {ROWS} rows of the above", f"V = {vocabulary:6}"
        report.add(title, row, "compute_boundaries", whole / MIB)
        report.add(title, row, "of the check of the head on 8 tokens, alone", check / MIB)
    smallest = found[0][0]
    for whole, check in found:
        assert whole <= FLAT * max(smallest, check), "boundaries grow with the vocabulary by more than the check of the head"

"""Benchmark of padding: an epoch of training steps with padded rows, with rows grouped by length, and without padding.

    EUA_TOFU=path/to/tofu pytest benches/test_padding.py --benchmark-only

The rows are a part of TOFU's forget10 and retain90, from the folder ``EUA_TOFU`` or from ``../shared/tofu``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import measure
import pytest
import torch
from conftest import DEVICE, filled
from report import Report
from steps import make_model, our_step

from eua.data.batches import ForgetRetainCollator, ForgetRetainDataset
from eua.data.pairing import PairedSampler
from eua.data.rows import encode_rows
from eua.data.sources import read_rows
from eua.demo.target import train_tokenizer

TOFU = Path(os.environ.get("EUA_TOFU", Path(__file__).parents[2] / "shared" / "tofu"))
HIDDEN_SIZE, LAYERS, VOCABULARY, BATCH, ROWS = 256, 2, 2048, 16, 160
WAYS = {"padded": (0, False), "padded, like lengths together": (BATCH, False), "without padding": (0, True)}


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    yield from filled(request, f"padding-{DEVICE}", "pytest benches/test_padding.py --benchmark-only")


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU's rows: set EUA_TOFU to their folder")
def test_an_epoch(benchmark, report: Report):
    texts = {kind: read_rows(TOFU / f"{name}.jsonl") for kind, name in (("forget", "forget10"), ("retain", "retain90"))}
    tokenizer = train_tokenizer([*texts["forget"], *texts["retain"]], vocabulary=VOCABULARY)
    rows = {kind: encode_rows(of_kind[:: len(of_kind) // ROWS][:ROWS], tokenizer, None) for kind, of_kind in texts.items()}
    constants = {"forget": 0.0, "retain": -40.0}  # boundaries that no token meets
    dataset = ForgetRetainDataset(
        rows, {kind: [torch.full((len(row.answer_ids),), constants[kind]) for row in rows[kind]] for kind in rows}
    )
    model = make_model(len(tokenizer), HIDDEN_SIZE, LAYERS, False, DEVICE)
    lengths = [[len(row.input_ids) for row in rows[kind]] for kind in ("forget", "retain")]
    epochs = {}
    for way, (group, padding_free) in WAYS.items():
        items = [dataset[index] for index in PairedSampler(*lengths, ratio=1, seed=0, group=group)]
        collate = ForgetRetainCollator(padding_free)
        batches = [collate(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        epochs[way] = [{name: tensor.to(DEVICE) for name, tensor in batch.items()} for batch in batches]

    def run(way: str) -> None:
        for batch in epochs[way]:
            our_step(model, batch["reference"][:, 1:], batch)
            model.zero_grad()

    times = measure.medians({way: lambda way=way: run(way) for way in epochs}, DEVICE, rounds=2)
    benchmark.pedantic(run, args=("padded",), rounds=1)
    tokens = sum(int((batch["position_ids"] >= 0).sum()) for batch in epochs["without padding"])
    model_name = f"Llama of {HIDDEN_SIZE} × {LAYERS}, V = {VOCABULARY}, float32"
    title = f"An epoch of {ROWS} forget rows of TOFU, {BATCH} + {BATCH} rows a step, {model_name}"
    for way, batches in epochs.items():
        places = sum(batch["input_ids"].numel() for batch in batches)
        report.add(title, way, "share of padding", 1 - tokens / places)
        report.add(title, way, "time / padded", times[way] / times["padded"])
    assert sum(int(batch["attention_mask"].sum()) for batch in epochs["padded"]) == tokens

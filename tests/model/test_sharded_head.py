"""Tests of a head that FSDP2 has resharded before the energy reads it: it is gathered, with the gradients of one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from eua.data.batches import pad_rows
from eua.data.rows import EncodedRow
from eua.distributed import any_process, own_part
from eua.guard.scores import prompt_scores
from eua.model.forward import check_head, token_energies
from eua.model.head import output_head
from eua.training.boundaries import ReferenceStore, compute_boundaries, fingerprint
from tests.conftest import tiny_llama
from tests.processes import Ranks

ROWS = [EncodedRow([3 + (7 * i + 5 * j) % 60 for j in range(5 + i % 4)], 2) for i in range(8)]


def start_accelerate() -> None:
    """As a launcher, which sets these variables, and then a trainer do."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": "1"}
    assert PartialState(cpu=True).num_processes == dist.get_world_size()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), start_accelerate)
    yield started
    started.stop()


def sharded(model: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> nn.Module:
    """Every weight is sharded except while its module runs; so the head is sharded once the model's forward has ended."""
    settings = {"reshard_after_forward": True, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def loss(model: nn.Module, rows: list[EncodedRow]) -> Tensor:
    energy, nll = token_energies(model, pad_rows(rows), 0.7)
    return energy.square().sum() + nll.sum()


def check_gradients(group: dist.ProcessGroup, tied: bool, frozen: bool) -> None:
    model = tiny_llama(64)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.weight.requires_grad_(not frozen)
    whole, model = model, sharded(copy.deepcopy(model), group)
    size, rank = group.size(), group.rank()
    loss(whole, ROWS).div(size).backward()  # FSDP averages over processes
    loss(model, ROWS[rank::size]).backward()
    assert isinstance(model.lm_head.weight, DTensor)
    for (name, expected), (_, found) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        if not expected.requires_grad:
            assert found.grad is None
            continue
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("tied", "frozen"), [(False, False), (True, False), (False, True)])
def test_gradients_are_those_of_one_process(ranks, tied, frozen):
    ranks.run(2, check_gradients, tied, frozen)


def check_values(group: dist.ProcessGroup) -> None:
    whole = tiny_llama(64)
    model = sharded(copy.deepcopy(whole), group)
    check_head(model)
    for kind in ("forget", "retain"):
        settings = {"fraction": 0.2, "temperature": 1.0, "fill": "zero"}
        for found, expected in zip(*(compute_boundaries(m, ROWS, kind, **settings) for m in (model, whole)), strict=True):
            torch.testing.assert_close(found, expected)
    prompts = [row.prompt_ids for row in ROWS]
    torch.testing.assert_close(prompt_scores(model, prompts), prompt_scores(whole, prompts))
    assert output_head(model).vocabulary == 64


def test_values_are_those_of_one_process(ranks):
    ranks.run(2, check_values)


def check_mixed_precision(group: dist.ProcessGroup) -> None:
    """Weights are float32 and cast when they are gathered, including those of the head, wherever it is read."""
    whole = tiny_llama(64).to(torch.bfloat16)
    model = sharded(tiny_llama(64), group, torch.bfloat16)
    check_head(model)
    with torch.no_grad():
        for found, expected in zip(*(token_energies(m, pad_rows(ROWS), 0.7) for m in (model, whole)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    loss(model, ROWS).backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert model.lm_head.weight.grad.full_tensor().abs().sum() > 0


def test_mixed_precision(ranks):
    ranks.run(2, check_mixed_precision)


def check_world(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank()
    assert broadcast_object_list([f"of {rank}"]) == ["of 0"]
    assert any_process(rank == 1, torch.device("cpu"))
    assert not any_process(False, torch.device("cpu"))
    for count in range(8):
        mine = own_part(list(range(count)))
        assert len(mine) == -(-count // dist.get_world_size())
        assert set(gather_object(mine)) == set(range(count))
    model = sharded(tiny_llama(64, seed=0), group)
    assert fingerprint(model, {"forget": ROWS}, {}) == fingerprint(tiny_llama(64), {"forget": ROWS}, {})


def test_processes_agree(ranks):
    ranks.run(3, check_world)


def check_store(group: dist.ProcessGroup, folder: Path) -> None:
    rank = dist.get_rank()
    path = folder / str(rank) / "boundaries.safetensors"  # each process has a disk of its own
    rows = {"forget": ROWS, "retain": ROWS[:5]}
    settings = {"fraction": 0.2, "temperature": 1.0, "fill": "zero"}
    model = tiny_llama(64)
    stores = [ReferenceStore(path, rows, **settings) for _ in range(2)]
    stores[0].look_up(model, resuming=False)
    assert stores[0].missing == 13
    stores[0].complete(model, batch_size=2, progress=False)
    assert path.exists() == (rank == 0)
    for kind, of_rows in rows.items():
        for found, expected in zip(stores[0].values[kind], compute_boundaries(model, of_rows, kind, **settings), strict=True):
            torch.testing.assert_close(found, expected)

    other = tiny_llama(64, seed=rank)  # weights that are loaded by the first process only
    stores[1].look_up(other, resuming=True)
    assert stores[1].missing == 0


def test_the_first_process_reads_the_boundaries_for_all(ranks, tmp_path):
    ranks.run(3, check_store, tmp_path)

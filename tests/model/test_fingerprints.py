"""Tests that a fingerprint counts every value of the weights, and that changes show without reading all of them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eua.model import fingerprints
from eua.model.fingerprints import PARTS, model_fingerprint, recent_fingerprint
from tests.conftest import tiny_llama


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def model(request) -> nn.Module:
    return tiny_llama(1000).to(request.param)


def test_every_value_counts(model):
    """Changes that a sample of the values misses: of one value, of all rows but a few, of an order, of signs in pairs."""
    head = model.lm_head.weight.data
    original = head.clone()
    seen = {model_fingerprint(model)}

    def changed(how: str) -> None:
        digest = model_fingerprint(model)
        assert digest not in seen, how
        seen.add(digest)
        head.copy_(original)

    for row, column in ((0, 0), (517, 3), (999, 31)):
        head[row, column] *= 1.01
        changed("one value")
    head[40:960] = 0.0
    changed("most rows")
    head[[3, 700]] = head[[700, 3]]
    changed("two rows change places")
    head[:, [1, 2]] = head[:, [2, 1]]
    changed("two columns change places")
    head[5, :2] *= -1
    changed("two signs")
    head.mul_(-1)
    changed("all signs")
    head[7, 7] = torch.nextafter(head[7, 7], torch.tensor(torch.inf, dtype=head.dtype))
    changed("the last bit of one value")
    assert model_fingerprint(model) in seen


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
    place=st.integers(0, 10**6),
    offset=st.integers(0, 3),
)
def test_checksums_are_of_values_in_any_shape_and_place(shape, dtype, place, offset):
    """They do not depend on how a tensor lies in memory, and any one value that changes shows in the part it belongs to."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = torch.empty(offset + values.numel(), dtype=dtype)
    lying = stored[offset:].view(values.shape).copy_(values)

    def sums(tensor: torch.Tensor) -> list[list[int]]:
        return [[int(x) for x in part] for part in fingerprints._checksums(tensor, range(PARTS))]

    expected = sums(values)
    assert sums(lying) == expected
    assert sums(values.mT.contiguous().mT if values.ndim >= 2 else values) == expected
    for part in range(PARTS):
        assert [[int(x) for x in of_part] for of_part in fingerprints._checksums(values, [part])] == [expected[part]]
    if values.numel():
        flat = lying.view(-1).view(torch.uint8)
        flat[place % len(flat)] ^= 1
        size = len(flat) // 4 if len(flat) % 4 == 0 else values.numel()  # in words
        parts_of_it = PARTS if size < fingerprints._SMALL else 1
        assert sum(a != b for a, b in zip(sums(lying), expected, strict=True)) == parts_of_it


def test_large_tensors_are_summed_in_blocks_and_their_order_counts(monkeypatch):
    holder = nn.Linear(64, 1024, bias=False)
    monkeypatch.setattr(fingerprints, "_BLOCK", 256)
    fingerprints._keys.cache_clear()
    before = model_fingerprint(holder)
    with torch.no_grad():
        holder.weight[:8] = holder.weight[:8].roll(4, 0)  # two blocks of the first part change places
    assert model_fingerprint(holder) != before
    fingerprints._keys.cache_clear()


def fused_step(model: nn.Module) -> None:
    parameter = model.get_parameter("model.norm.weight")
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=1e-2, fused=True).step()


def change_one_value_through_data(model: nn.Module) -> None:
    model.get_parameter("lm_head.weight").data[517, 3] += 1


def change_a_tensor_through_data(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(1.01)


def zero_most_rows_through_data(model: nn.Module) -> None:
    model.get_parameter("lm_head.weight").data[40:960] = 0


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[517, 3] += 1


def replace_a_parameter(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)


def load_other_weights(model: nn.Module) -> None:
    model.load_state_dict(tiny_llama(1000, seed=1).state_dict(), strict=False)


def change_a_saved_buffer(model: nn.Module) -> None:
    model.lm_head.scales.data[3] += 1


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (fused_step, 1),
        (change_a_tensor_through_data, 1),
        (zero_most_rows_through_data, 3),
        (change_one_value_through_data, PARTS),
        (change_in_place, 1),
        (replace_a_parameter, 1),
        (load_other_weights, 1),
        (change_a_saved_buffer, PARTS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_show_within_a_few_calls(change, calls):
    model = tiny_llama(1000)
    model.lm_head.register_buffer("scales", torch.ones(20))
    before = model_fingerprint(model)
    for _ in range(2 * PARTS + 1):
        assert recent_fingerprint(model) == before
    change(model)
    assert any(recent_fingerprint(model) != before for _ in range(calls))
    assert recent_fingerprint(model) == model_fingerprint(model) != before


def test_an_unchanged_model_is_not_read_again(monkeypatch):
    """However often it is asked; moved weights, a copy of the model and any optimizer's step are reasons to read them all."""
    read = []
    whole = fingerprints.model_fingerprint
    monkeypatch.setattr(fingerprints, "model_fingerprint", lambda model: read.append(model) or whole(model))
    model = tiny_llama(1000)
    first = recent_fingerprint(model)
    assert [recent_fingerprint(model) for _ in range(20)] == [first] * 20
    assert len(read) == 1
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    other = copy.deepcopy(model)
    assert recent_fingerprint(model) == recent_fingerprint(other) == first
    assert read == [model, model, other]
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter]).step()
    assert recent_fingerprint(model) == first
    assert len(read) == 4


def test_one_of_several_processes_remembers_nothing(monkeypatch):
    monkeypatch.setattr(fingerprints, "has_other_processes", lambda: True)
    model = tiny_llama(100)
    assert recent_fingerprint(model) == recent_fingerprint(model)
    assert model not in fingerprints._known


def test_what_is_remembered_goes_with_the_model():
    kept = len(fingerprints._known)
    model = tiny_llama(100)
    model_fingerprint(model)
    assert len(fingerprints._known) == kept + 1
    del model
    gc.collect()
    assert len(fingerprints._known) <= kept


def test_small_tensors_are_read_in_every_call():
    model = tiny_llama(1000)
    first = recent_fingerprint(model)
    model.model.norm.weight.data[0] *= 3
    assert recent_fingerprint(model) != first

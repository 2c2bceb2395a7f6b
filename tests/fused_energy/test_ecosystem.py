"""Tests of the energy op inside PyTorch: compiled, checkpointed, wrapped, sharded, patched into a stock model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_energy import LinearEnergy, dispatch, linear_energy
from tests.conftest import tiny_llama
from tests.fused_energy.numerics import IGNORED, normal, some_targets
from tests.processes import Ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from replace_loss import loss_without_logits

N, H, V = 12, 8, 50
TARGETS = some_targets(3, N, V)


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), bias (V,), all of which need a gradient."""
    return normal(0, N, H).requires_grad_(), normal(1, V, H).requires_grad_(), normal(2, V).requires_grad_()


def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    energy, nll = linear_energy(hidden, weight, TARGETS[: len(hidden)], bias=bias, temperature=0.7, softcap=5.0)
    return energy.square().sum() + nll.sum()


def gradients_of(function: Callable[..., Tensor], tokens: int = N) -> list[Tensor]:
    hidden, weight, bias = leaves()
    function(hidden[:tokens], weight, bias).backward()
    return [leaf.grad for leaf in (hidden, weight, bias)]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("store", [True, False])
def test_opcheck(temperature, with_targets, store):
    hidden, weight, bias = (x.detach() for x in leaves())
    targets = TARGETS.where(TARGETS != IGNORED, -1) if with_targets else None
    options = (temperature, 0.5, 3.0, "streaming", "")
    torch.library.opcheck(torch.ops.fused_energy.forward.default, (hidden, weight, bias, targets, *options, store))
    if store:
        done = torch.ops.fused_energy.forward(hidden, weight, bias, targets, *options, store)
        upstream = torch.ones_like(done[0]), torch.ones_like(done[1])
        arguments = (hidden, weight, bias, targets, *options, *done, *upstream, True, True, True)
        torch.library.opcheck(torch.ops.fused_energy.backward.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_break(backend):
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (N, N - 1, N - 5):  # different lengths need no new graph
        assert_all_close(gradients_of(compiled, tokens), gradients_of(loss_of, tokens))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves()), loss_of(*leaves()))


def test_compiled_label_out_of_range_makes_its_nll_nan():
    torch.compiler.reset()
    compiled = torch.compile(lambda h, w, y: linear_energy(h, w, y).nll, fullgraph=True, backend="aot_eager")
    nll = compiled(normal(0, 3, H), normal(1, V, H), torch.tensor([V, -1, 0]))
    assert nll.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    assert_all_close(
        gradients_of(lambda *tensors: checkpoint(loss_of, *tensors, use_reentrant=use_reentrant)), gradients_of(loss_of)
    )


def test_backward_twice_through_a_kept_graph():
    hidden, weight, bias = leaves()
    loss = loss_of(hidden, weight, bias)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_all_close([x.grad / 2 for x in (hidden, weight, bias)], gradients_of(loss_of))


def test_functional_transforms():
    tensors = [x.detach() for x in leaves()]
    assert_all_close(list(torch.func.grad(loss_of, argnums=(0, 1, 2))(*tensors)), gradients_of(loss_of))
    value, pull_back = torch.func.vjp(loss_of, *tensors)
    assert_all_close(list(pull_back(torch.ones_like(value))), gradients_of(loss_of))


def energy_alone(hidden: Tensor) -> Tensor:
    return linear_energy(hidden, normal(1, V, H)).sum()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (lambda x: torch.func.vmap(linear_energy, (0, None))(x, normal(1, V, H)), "torch.vmap, which it does not support"),
        (lambda x: torch.func.grad(lambda h: torch.func.grad(energy_alone)(h).sum())(x), "second derivative of linear_energy"),
        (lambda x: torch.func.jvp(energy_alone, (x,), (x,)), "jvp"),
    ],
    ids=["vmap", "grad of grad", "jvp"],
)
def test_unsupported_transforms_raise_an_error(what, text):
    with pytest.raises(NotImplementedError, match=text):
        what(normal(0, N, H))


def test_second_derivative_is_refused_and_the_reference_has_it():
    def penalty(implementation: str) -> Tensor:
        hidden = normal(0, N, H).requires_grad_()
        energy = linear_energy(hidden, normal(1, V, H), implementation=implementation)
        (gradient,) = torch.autograd.grad(energy.sum(), hidden, create_graph=True)
        (energy.sum() + gradient.square().sum()).backward()
        return hidden.grad

    with pytest.raises(NotImplementedError, match='second derivative .* pass implementation="reference"'):
        penalty("streaming")
    assert torch.isfinite(penalty("reference")).all()


def test_tied_embedding_collects_both_gradients():
    """The head's weight is also the embedding: it receives both gradients."""
    gradients = []
    for implementation in ("reference", "streaming"):
        embedding = nn.Embedding(V, H)
        with torch.no_grad():
            embedding.weight.copy_(normal(1, V, H))
        ids = torch.arange(N)
        nll = linear_energy(embedding(ids), embedding.weight, ids + 1, logit_scale=H**-0.5, implementation=implementation).nll
        nll.sum().backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients)


class TinyModel(nn.Module):
    """An embedding, one layer, and a head whose logits are never computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, H), nn.Linear(H, H)
        self.head = LinearEnergy(nn.Linear(H, V), softcap=10.0)

    def forward(self, ids: Tensor) -> Tensor:
        both = self.head(torch.tanh(self.layer(self.embedding(ids[:-1]))), ids[1:])
        return (both.energy + both.nll).sum()


def data_parallel(group: ProcessGroup, wrap: str) -> None:
    """Every rank sees its own tokens; the gradients equal those of one process that sees all tokens."""
    torch.manual_seed(0)
    alone = TinyModel()
    batches = [torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(seed)) for seed in range(group.size())]
    (sum(alone(ids) for ids in batches) / group.size()).backward()
    model: Any = copy.deepcopy(alone)
    model.zero_grad()
    if wrap == "DDP":
        model = DistributedDataParallel(model, process_group=group)
    else:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    model(batches[dist.get_rank(group)]).backward()
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        gradient = parameter.grad if wrap == "DDP" else parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, expected.grad, msg=name)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_data_parallel(ranks, wrap):
    ranks.run(2, data_parallel, wrap)


def test_module_shares_the_parameters_of_its_layer():
    layer = nn.Linear(H, V)
    module = LinearEnergy(layer, temperature=2.0, logit_scale=0.5, softcap=3.0, ignore_index=7)
    assert dict(module.named_parameters()) == {"head.weight": layer.weight, "head.bias": layer.bias}
    hidden, targets = normal(0, 2, 3, H), torch.tensor([[1, 7, 2], [7, 7, 9]])
    expected = linear_energy(
        hidden, layer.weight, targets, bias=layer.bias, temperature=2.0, logit_scale=0.5, softcap=3.0, ignore_index=7
    )
    assert all(torch.equal(a, b) for a, b in zip(module(hidden, targets), expected, strict=True))
    torch.testing.assert_close(module.nll(hidden, targets), expected.nll.sum() / 3)
    torch.testing.assert_close(module.nll(hidden, targets, 12), expected.nll.sum() / 12)
    assert module.nll(hidden, torch.full_like(targets, 7)) == 0
    assert "softcap=3.0" in repr(module)


@pytest.mark.parametrize("autocast", [False, True])
def test_stock_model_with_its_loss_replaced(autocast):
    """The worked example: same loss, same gradients, and the model is restored afterwards."""
    ids = torch.randint(0, 90, (2, 13), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(13) > 4, IGNORED)
    results = []
    model = tiny_llama(90)

    def step(**options: Any) -> Any:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(ids, labels=labels, **options)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
        return output

    for options in ({}, {"num_items_in_batch": 40}):
        logits = step(**options).logits
        with loss_without_logits(model):
            assert step(**options).logits.shape == (2, 13, model.config.hidden_size)
        assert torch.equal(step(**options).logits, logits)
    tolerance = {"rtol": 0.05, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for stock, replaced, again in (results[:3], results[3:]):
        for a, b, c in zip(stock, replaced, again, strict=True):
            torch.testing.assert_close(b, a, **tolerance)
            assert torch.equal(a, c)


def test_example_refuses_a_model_that_changes_its_logits():
    model = tiny_llama(90)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="changes its logits after the head"), loss_without_logits(model):
        pass


def test_the_compiler_takes_the_support_of_a_gpu_for_a_constant(monkeypatch):
    """Without the mark on the function, looking at the device would break the graph."""

    def capability(device: torch.device) -> tuple[int, int]:
        torch._dynamo.graph_break()
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    compiled = torch.compile(lambda x: x + dispatch._gpu_is_supported(x.device), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1

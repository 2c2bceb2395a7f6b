"""Tests of heads whose rows are split over ranks: energies, tails and gradients equal those of the full head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_energy import EnergyNLL, linear_energy, streaming, tail_energy
from fused_energy import common as shared
from tests.processes import Ranks

TINY_SCRATCH = 4 * 36  # bytes: every case crosses several tiles

# Number of the head's rows on each rank.
SPLITS = {
    "even over two": (6, 6),
    "uneven over two": (11, 1),
    "none on the first of two": (0, 12),
    "even over three": (4, 4, 4),
    "uneven over three": (1, 9, 2),
    "none on the second of three": (7, 0, 5),
    "all on the last of three": (0, 0, 12),
}
V, N, H = 12, 9, 5
splits = pytest.mark.parametrize("counts", SPLITS.values(), ids=SPLITS.keys())


def small_tiles() -> None:
    shared.SCRATCH_BYTES, streaming.VOCABULARY_TILE = TINY_SCRATCH, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), small_tiles)
    yield started
    started.stop()


# ---------------------------------------------------------------------------------------------------- the problem


def make(dtype: torch.dtype = torch.float64, n: int = N, v: int = V, h: int = H, seed: int = 0) -> dict[str, Tensor]:
    """The same tensors on every rank: hidden (N, H), weight (V, H), bias (V,), targets and upstream gradients (N,)."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in {"hidden": (n, h), "weight": (v, h), "bias": (v,), "energy": (n,), "nll": (n,)}.items()
    }
    made["targets"] = torch.arange(n) * 7 % v  # every stretch of the vocabulary holds some
    made["targets"][::4] = -100
    return made


def own_rows(group: ProcessGroup, counts: tuple[int, ...]) -> slice:
    rank = dist.get_rank(group)
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def outputs_and_gradients(
    problem: dict[str, Tensor], names: tuple[str, ...], needs: tuple[str, ...], **options: object
) -> dict[str, Tensor]:
    """Energy (and NLL) and the gradients of Σ upstream · output for ``needs``; ``names`` are the inputs to pass."""
    inputs = {name: problem[name].clone().requires_grad_(name in needs) for name in names}
    result = linear_energy(**inputs, **options)
    found = result._asdict() if isinstance(result, EnergyNLL) else {"energy": result}
    loss = sum((value.double() * problem[name].double()).sum() for name, value in found.items())
    if loss.requires_grad:
        loss.backward()
    return found | {f"gradient of {name}": inputs[name].grad for name in needs}


def rows_only(results: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The results that a rank with these rows of the head must return."""
    return {name: x[rows] if name in ("gradient of weight", "gradient of bias") else x for name, x in results.items()}


def with_rows(problem: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return problem | {"weight": problem["weight"][rows], "bias": problem["bias"][rows]}


@contextmanager
def scratch(numbers: int) -> Iterator[None]:
    shared.SCRATCH_BYTES = 4 * numbers
    yield
    shared.SCRATCH_BYTES = TINY_SCRATCH


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}: " + "{}"
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=message.format)


# ---------------------------------------------------------------------------------------------------- energy and NLL

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "logit scale": {"logit_scale": -2.0},
    "softcap": {"softcap": 1.5},
    "all, streaming": {"temperature": 2.5, "logit_scale": 0.25, "softcap": 5.0, "implementation": "streaming"},
}
HEAD = ("hidden", "weight", "bias")


def energy_is_that_of_the_whole_head(
    group: ProcessGroup, counts: tuple[int, ...], names: tuple[str, ...], needs: tuple[str, ...], options: dict
) -> None:
    rows, problem = own_rows(group, counts), make()
    expected = outputs_and_gradients(problem, names, needs, **{**options, "implementation": "reference"})
    found = outputs_and_gradients(with_rows(problem, rows), names, needs, process_group=group, **options)
    assert_same(found, rows_only(expected, rows))


@splits
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_energy_nll_and_gradients_are_those_of_the_whole_head(ranks, counts, options):
    ranks.run(len(counts), energy_is_that_of_the_whole_head, counts, (*HEAD, "targets"), HEAD, options)


@splits
@pytest.mark.parametrize("names", [("hidden", "weight"), HEAD], ids=["no bias", "bias"])
def test_energy_alone(ranks, counts, names):
    ranks.run(len(counts), energy_is_that_of_the_whole_head, counts, names, names, {"temperature": 0.7})


@pytest.mark.parametrize("counts", [(11, 1), (7, 0, 5)], ids=str)
@pytest.mark.parametrize(
    "needs",
    [(), ("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")],
    ids=lambda needs: " and ".join(needs) or "nothing",
)
def test_only_what_needs_a_gradient_gets_one(ranks, counts, needs):
    """A frozen head, and a trainable head after frozen hidden states, take separate paths."""
    options = {"temperature": 0.3, "softcap": 2.0}
    ranks.run(len(counts), energy_is_that_of_the_whole_head, counts, (*HEAD, "targets"), needs, options)


def any_number_of_tokens(group: ProcessGroup, shape: tuple[int, ...]) -> None:
    rows, problem = own_rows(group, (5, 0, 7)), make(n=torch.Size(shape).numel())
    for name in ("hidden", "targets", "energy", "nll"):
        problem[name] = problem[name].reshape(shape + problem[name].shape[1:])
    names = (*HEAD, "targets")
    expected = outputs_and_gradients(problem, names, HEAD, implementation="reference")
    assert expected["energy"].shape == shape
    found = outputs_and_gradients(with_rows(problem, rows), names, HEAD, process_group=group)
    assert_same(found, rows_only(expected, rows))
    tails = [
        tail_energy(problem["hidden"], head, 0.5, "top", implementation=name, process_group=g)
        for head, name, g in ((problem["weight"], "reference", None), (problem["weight"][rows], "auto", group))
    ]
    torch.testing.assert_close(*tails)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (2, 3)], ids=str)
def test_any_number_of_tokens(ranks, shape):
    ranks.run(3, any_number_of_tokens, shape)


def everything_ignored(group: ProcessGroup) -> None:
    problem = with_rows(make(), own_rows(group, (5, 0, 7)))
    problem["targets"].fill_(-100)
    problem["hidden"].fill_(torch.nan)
    found = outputs_and_gradients(problem, (*HEAD, "targets"), HEAD, process_group=group)
    assert all((x == 0).all() for x in found.values())


def test_ignored_tokens_are_zero_whatever_they_hold(ranks):
    ranks.run(3, everything_ignored)


def non_finite(group: ProcessGroup, where: str, counts: tuple[int, ...]) -> None:
    rows, problem = own_rows(group, counts), make()
    if where == "the rows of one rank are masked":  # its logsumexp is −inf, and its mean 0/0
        problem["bias"][: counts[0]] = -torch.inf
        problem["targets"][problem["targets"] < counts[0]] = V - 1
    elif where == "everything is masked":
        problem["bias"].fill_(-torch.inf)
    elif where == "a logit is infinite":
        problem["bias"][3] = torch.inf
    elif where == "a logit is no number":
        problem["bias"][3] = torch.nan
    else:
        problem["hidden"][:3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])  # the first of them is ignored
    for names in (HEAD, (*HEAD, "targets")):
        expected = outputs_and_gradients(problem, names, HEAD, implementation="reference")
        found = outputs_and_gradients(with_rows(problem, rows), names, HEAD, process_group=group)
        assert_same(found, rows_only(expected, rows))


@pytest.mark.parametrize("counts", [(6, 6), (4, 0, 8)], ids=str)
@pytest.mark.parametrize(
    "where",
    [
        "the rows of one rank are masked",
        "everything is masked",
        "a logit is infinite",
        "a logit is no number",
        "hidden states are not finite",
    ],
)
def test_what_is_not_finite_stays_as_in_the_definition(ranks, counts, where):
    ranks.run(len(counts), non_finite, where, counts)


def half_precision(group: ProcessGroup, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, v = own_rows(group, counts), sum(counts)
    rounded = make(dtype, n=48, v=v, h=32)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in rounded.items()}
    names = (*HEAD, "targets")
    expected = outputs_and_gradients(exact, names, HEAD, implementation="reference", temperature=0.7)
    with scratch(numbers=1000):
        whole = outputs_and_gradients(rounded, names, HEAD, implementation="streaming", temperature=0.7)
        found = outputs_and_gradients(with_rows(rounded, rows), names, HEAD, process_group=group, temperature=0.7)
    expected, whole = rows_only(expected, rows), rows_only(whole, rows)
    for name, value in expected.items():
        assert found[name].dtype == whole[name].dtype
        errors = [float((x[name].double() - value).norm()) for x in (found, whole)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * float(value.norm()), (name, errors)


@pytest.mark.parametrize("counts", [(50, 47), (60, 0, 37)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_that_of_the_whole_head(ranks, counts, dtype):
    ranks.run(len(counts), half_precision, counts, dtype)


def two_energies_in_one_graph(group: ProcessGroup, counts: tuple[int, ...]) -> None:
    """A step of D²: forgotten and retained tokens through one head, whose gradients add up."""
    rows, gradients = own_rows(group, counts), []
    for name, part, g in (("reference", slice(None), None), ("auto", rows, group)):
        problem = make()
        hidden, weight = problem["hidden"].requires_grad_(), problem["weight"][part].clone().requires_grad_()
        forget = linear_energy(hidden[:4], weight, implementation=name, process_group=g)
        retain = linear_energy(hidden[4:], weight, problem["targets"][4:], implementation=name, process_group=g)
        (retain.nll.mean() + retain.energy.square().mean() + torch.relu(forget + 2).square().mean()).backward()
        gradients.append({"gradient of hidden": hidden.grad, "gradient of weight": weight.grad})
    assert_same(gradients[1], rows_only(gradients[0], rows))


@pytest.mark.parametrize("counts", [(11, 1), (7, 0, 5)], ids=str)
def test_two_energies_in_one_graph(ranks, counts):
    ranks.run(len(counts), two_energies_in_one_graph, counts)


def compiled(group: ProcessGroup, counts: tuple[int, ...]) -> None:
    rows, problem = own_rows(group, counts), make()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def energy(**inputs: Tensor) -> EnergyNLL:
        return linear_energy(**inputs, process_group=group)

    inputs = {name: with_rows(problem, rows)[name].clone() for name in (*HEAD, "targets")}
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_()
    result = energy(**inputs)
    (result.energy * problem["energy"] + result.nll * problem["nll"]).sum().backward()
    names, needs = (*HEAD, "targets"), ("hidden", "weight")
    expected = outputs_and_gradients(problem, names, needs, implementation="reference")
    found = result._asdict() | {f"gradient of {name}": inputs[name].grad for name in needs}
    assert_same(found, rows_only(expected, rows))

    problem["targets"][:3] = torch.tensor([V, -7, V - 1])
    nll = energy(**{name: with_rows(problem, rows)[name] for name in (*HEAD, "targets")}).nll
    assert nll.isnan().tolist() == [True, True] + [False] * (N - 2)


def test_compiled_without_graph_break_and_nll_of_a_label_out_of_range_is_nan(ranks):
    ranks.run(3, compiled, (7, 0, 5))


# ---------------------------------------------------------------------------------------------------- tails

TAIL_OPTIONS = {"plain": {}, "all": {"temperature": 0.3, "logit_scale": -2.0, "softcap": 5.0}}
FRACTIONS = (0.1, 0.25, 0.6, 1.0)  # of 12 logits 1, 3, 7 and all: fewer and more than some ranks hold


def tails_are_those_of_the_whole_head(group: ProcessGroup, counts: tuple[int, ...], side: str, fill: str, bias: str) -> None:
    rows, problem = own_rows(group, counts), make()
    if bias == "of numbers and others":
        problem["bias"][:5] = torch.tensor([torch.nan, torch.inf, torch.nan, -torch.inf, torch.nan])
    for fraction in FRACTIONS:
        for options in TAIL_OPTIONS.values():
            arguments = {"fraction": fraction, "side": side, "fill": fill, **options}
            found, expected = (
                tail_energy(problem["hidden"], head["weight"], bias=head["bias"], **arguments, **where)
                for head, where in (
                    (with_rows(problem, rows), {"process_group": group}),
                    (problem, {"implementation": "reference"}),
                )
            )
            assert_same({f"{fraction}, {options}": found}, {f"{fraction}, {options}": expected})


@splits
@pytest.mark.parametrize("side", ["top", "bottom"])
@pytest.mark.parametrize("fill", ["zero", "none"])
@pytest.mark.parametrize("bias", ["of numbers", "of numbers and others"])
def test_tails_are_those_of_the_whole_head(ranks, counts, side, fill, bias):
    ranks.run(len(counts), tails_are_those_of_the_whole_head, counts, side, fill, bias)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return result


def tails_stay_within_the_scratch(group: ProcessGroup, counts: tuple[int, ...]) -> None:
    problem = make(n=40, v=sum(counts), h=2)  # the inputs are small, so that only logits and candidates can be large
    weight = problem["weight"][own_rows(group, counts)].clone()
    with scratch(numbers=2400 // shared.TAIL_TILES), Largest() as largest:
        tail_energy(problem["hidden"], weight, 0.9, "bottom", process_group=group)
    assert largest.numbers <= 2400


@pytest.mark.parametrize("counts", [(200, 200, 200), (0, 600, 0)], ids=str)
def test_tails_hold_a_few_tokens_at_a_time(ranks, counts):
    """This includes the candidates of all ranks, which padding can make many times larger than the vocabulary."""
    ranks.run(len(counts), tails_stay_within_the_scratch, counts)


# ---------------------------------------------------------------------------------------------------- DTensors


def mesh_of(group: ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def distributed(problem: dict[str, Tensor], mesh: DeviceMesh, placement: object) -> dict[str, Tensor]:
    return problem | {name: distribute_tensor(problem[name], mesh, [placement]) for name in ("weight", "bias")}


def energy_of_a_dtensor(group: ProcessGroup, v: int, placement: object, hidden_too: bool) -> None:
    mesh, names = mesh_of(group), (*HEAD, "targets")
    problem = make(v=v)
    expected = outputs_and_gradients(problem, names, HEAD, implementation="reference", temperature=0.3)
    own = distributed(problem, mesh, placement)
    if hidden_too:
        own["hidden"] = distribute_tensor(problem["hidden"], mesh, [Replicate()])
    found = outputs_and_gradients(own, names, HEAD, temperature=0.3)
    wanted = {"hidden": Replicate() if hidden_too else None, "weight": placement, "bias": placement}
    for name, place in wanted.items():
        gradient = found[f"gradient of {name}"]
        assert (list(gradient.placements) if isinstance(gradient, DTensor) else [None]) == [place], name
        if isinstance(gradient, DTensor):
            found[f"gradient of {name}"] = gradient.full_tensor()
    assert_same(found, expected)

    top = tail_energy(own["hidden"], own["weight"], 0.5, "top", bias=own["bias"])
    whole = {name: problem[name] for name in HEAD}
    assert_same({"tail": top}, {"tail": tail_energy(**whole, fraction=0.5, side="top", implementation="reference")})


@pytest.mark.parametrize("hidden_too", [False, True], ids=["hidden plain", "hidden replicated"])
@pytest.mark.parametrize(
    ("size", "v", "placement"),
    [
        pytest.param(2, 12, Shard(0), id="6 and 6 rows"),
        pytest.param(3, 7, Shard(0), id="3, 3 and 1 rows"),
        pytest.param(3, 4, Shard(0), id="2, 2 and no rows"),
        pytest.param(2, 12, Replicate(), id="replicated"),
    ],
)
def test_a_dtensor_needs_no_process_group(ranks, size, v, placement, hidden_too):
    ranks.run(size, energy_of_a_dtensor, v, placement, hidden_too)


def autocast_of_a_dtensor(group: ProcessGroup) -> None:
    problem = make(torch.float32)
    own = distributed(problem, mesh_of(group), Shard(0))
    names = (*HEAD, "targets")
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(own, names, HEAD)
        expected = outputs_and_gradients(problem, names, HEAD, implementation="reference")
    gradient = found["gradient of weight"]
    assert isinstance(gradient, DTensor)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.full_tensor(), expected["gradient of weight"], rtol=0.05, atol=0.05)


def test_a_float32_dtensor_under_autocast(ranks):
    ranks.run(3, autocast_of_a_dtensor)


def dtensors_that_cannot_work(group: ProcessGroup, which: str) -> None:
    mesh, problem = mesh_of(group), make()
    own, extra = distributed(problem, mesh, Shard(0)), {}
    if which == "weight split by columns":
        own["weight"] = distribute_tensor(problem["weight"], mesh, [Shard(1)])
        message = r"weight is a DTensor placed .*Shard\(dim=1\).* can only be split by rows"
    elif which == "weight on two dimensions":
        two = init_device_mesh("cpu", (dist.get_world_size(group), 1))
        own["weight"] = distribute_tensor(problem["weight"], two, [Shard(0), Replicate()])
        message = "on a mesh of 2 dimension"
    elif which == "hidden split":
        own["hidden"] = distribute_tensor(problem["hidden"], mesh, [Shard(0)])
        message = r"hidden is a DTensor placed .*Shard\(dim=0\).* every rank needs the full hidden states"
    elif which == "hidden to be summed":
        own["hidden"] = DTensor.from_local(problem["hidden"], mesh, [Partial()])
        message = "hidden is a DTensor placed .*Partial.* every rank needs the full hidden states"
    elif which == "bias whole":
        own["bias"] = problem["bias"]
        message = "weight is a DTensor .* and bias is a plain tensor"
    elif which == "bias placed otherwise":
        own["bias"] = distribute_tensor(problem["bias"], mesh, [Replicate()])
        message = "a rank needs the bias of the rows it holds"
    elif which == "weight plain":
        own["weight"] = problem["weight"]
        message = "weight is a plain tensor and bias is a DTensor"
    else:
        own, extra = distributed(problem, mesh, Replicate()), {"process_group": group}
        message = "leave process_group out"
    for function, arguments in ((linear_energy, {}), (tail_energy, {"fraction": 0.5, "side": "top"})):
        with pytest.raises(ValueError, match=message):
            function(own["hidden"], own["weight"], bias=own["bias"], **arguments, **extra)


@pytest.mark.parametrize(
    "which",
    [
        "weight split by columns",
        "weight on two dimensions",
        "hidden split",
        "hidden to be summed",
        "bias whole",
        "bias placed otherwise",
        "weight plain",
        "weight replicated, and a group",
    ],
)
def test_dtensors_that_cannot_work_are_refused(ranks, which):
    ranks.run(3, dtensors_that_cannot_work, which)


# ---------------------------------------------------------------------------------------------------- mistakes


def other_tokens(group: ProcessGroup, which: str, function: str) -> None:
    """Passes what data-parallel ranks would pass: no rank may wait for the others, every rank must raise the error."""
    rank, problem = dist.get_rank(group), with_rows(make(), own_rows(group, (7, 0, 5)))
    if which == "other numbers":
        problem["hidden"] = make(seed=rank)["hidden"]
    elif which == "another number in one token":
        problem["hidden"][N - 1, 0] += rank / 10
    elif which == "another number, and some that are infinite":
        problem["hidden"][0] = torch.inf
        problem["hidden"][1] += rank
    elif which == "other signs":
        problem["hidden"] *= (-1) ** rank
    elif which == "another count, of zeros":  # like padding
        problem["hidden"] = torch.cat([problem["hidden"], problem["hidden"].new_zeros(rank, H)])
        problem["targets"] = torch.cat([problem["targets"], problem["targets"].new_zeros(rank)])
    else:
        count = {"another count": N - rank, "another count, or none": 0 if rank == 1 else N}[which]
        problem["hidden"], problem["targets"] = problem["hidden"][:count], problem["targets"][:count]
    problem["hidden"].requires_grad_()
    call, more = {
        "energy": (linear_energy, {}),
        "energy and NLL": (linear_energy, {"targets": problem["targets"]}),
        "tails": (tail_energy, {"fraction": 0.5, "side": "top"}),
    }[function]
    with pytest.raises(ValueError, match=r"different hidden states \(.* tokens\).* the same tokens on every rank"):
        call(problem["hidden"], problem["weight"], process_group=group, **more)


@pytest.mark.parametrize(
    "which",
    [
        "other numbers",
        "another number in one token",
        "another number, and some that are infinite",
        "other signs",
        "another count",
        "another count, or none",
        "another count, of zeros",
    ],
)
@pytest.mark.parametrize("function", ["energy", "energy and NLL", "tails"])
def test_ranks_with_different_tokens_raise_an_error(ranks, which, function):
    ranks.run(3, other_tokens, which, function)


def refused(group: ProcessGroup, which: str) -> None:
    problem = with_rows(make(), own_rows(group, (7, 0, 5)))
    hidden, weight, targets = (problem[name] for name in ("hidden", "weight", "targets"))
    if which == "a label beyond the vocabulary":
        targets[0] = V
        with pytest.raises(ValueError, match=f"out of range for a vocabulary of {V}"):
            linear_energy(hidden, weight, targets, process_group=group)
    elif which == "a label below it":
        targets[0] = -1
        with pytest.raises(ValueError, match=f"out of range for a vocabulary of {V}"):
            linear_energy(hidden, weight, targets, process_group=group)
    elif which == "a tail of less than one logit":
        with pytest.raises(ValueError, match=f"a vocabulary of {V} is less than one logit"):
            tail_energy(hidden, weight, 0.9 / V, "top", process_group=group)
    elif which == "the definition":
        with pytest.raises(ValueError, match="the reference needs the full head"):
            linear_energy(hidden, weight, implementation="reference", process_group=group)
        with pytest.raises(ValueError, match="the reference needs the full head"):
            tail_energy(hidden, weight, 0.5, "top", implementation="reference", process_group=group)
    else:
        with pytest.raises(ValueError, match="no rank of process_group holds a row"):
            linear_energy(hidden, weight[:0], process_group=group)


@pytest.mark.parametrize(
    "which",
    ["a label beyond the vocabulary", "a label below it", "a tail of less than one logit", "the definition", "no vocabulary"],
)
def test_what_cannot_work_is_refused_on_every_rank(ranks, which):
    ranks.run(3, refused, which)

"""Every method's loss on the toy world: values and gradients that the released code printed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eua.methods import distribution, rmu
from eua.methods.answers import Answers, Places
from eua.methods.d2 import above_boundary, below_boundary
from eua.methods.objective import Objective, figure_means
from eua.methods.retain import retained, retained_places
from eua.methods.table import METHODS
from tests.methods.toy_world import ALTERNATIVE, FORGET, RETAIN, A, B, answers_of, matrix

PAIRS = [[("forget", FORGET[0]), ("retain", RETAIN[0])], [("forget", FORGET[1])]]  # the retain batch has one row
WITH_ALTERNATIVES = [[("forget", f), ("alternative", k)] for f, k in zip(FORGET, ALTERNATIVE, strict=True)]
WITH_ALTERNATIVES[0].append(("retain", RETAIN[0]))


def loss_of(name: str, gamma: float, alpha: float, items=PAIRS, as_released=False, **parameters) -> tuple[float, list[float]]:
    """The loss of the toy batch, and its gradient with respect to the logits behind token 2."""
    weight = matrix(A)
    answers = answers_of(items, weight, matrix(B), METHODS[name].reference)
    objective = Objective(name, dict(METHODS[name].parameters) | parameters, "nll", as_released)
    loss = objective.loss(answers, gamma, alpha).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.item(), gradient[:, 2].tolist()


@pytest.mark.parametrize(
    ("name", "gamma", "alpha", "parameters", "value", "gradient"),
    [
        ("grad_ascent", 1, 0, {}, -1.833664, (-0.079897, -0.079897, -0.010813, 0.170607)),
        ("grad_diff", 1, 1, {}, -0.393475, None),
        ("npo", 1, 0, {"beta": 0.1}, 14.145850, (-0.193344, -0.193344, -0.026166, 0.412855)),
        ("npo", 1, 1, {"beta": 0.1}, 15.586040, None),
        ("simnpo", 0.125, 0, {"beta": 4.5, "delta": 0.0}, 0.000708, None),
        ("simnpo", 0.125, 1, {"beta": 4.5, "delta": 1.0}, 1.473579, None),
        ("wga", 1, 0, {"beta": 1.0}, -0.236340, None),
        ("wga", 1, 0, {"beta": 0.5}, -0.564427, None),
        ("satimp", 1, 0, {"beta": 5.0, "beta2": 1.0}, -0.002831, None),
        ("satimp", 1, 0.1, {"beta": 4.0, "beta2": 0.1}, 0.127295, None),
        ("me_gd", 1, 0, {}, 0.697370, (0.029897, 0.029897, -0.039187, -0.020607)),
        ("me_gd", 0.1, 1, {}, 1.509927, None),
    ],
)
def test_losses_are_those_of_the_released_code(name, gamma, alpha, parameters, value, gradient):
    found, found_gradient = loss_of(name, gamma, alpha, **parameters)
    assert found == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        assert found_gradient == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_npo_begins_with_a_known_value(beta):
    """Where the model is the reference, nothing is in excess: ``2/β·ln 2``."""
    loss = Objective("npo", {"beta": beta}).loss(answers_of(PAIRS, matrix(A), matrix(A), "nll"), 1, 0).loss
    assert loss.item() == pytest.approx(2 / beta * math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["idk_dpo", "alt_po"])
def test_dpo(name):
    value, gradient = loss_of(name, 1, 0, WITH_ALTERNATIVES, beta=0.1)
    assert value == pytest.approx(15.776699, abs=1e-6)
    assert gradient == pytest.approx((-0.252118, 0.237796, -0.563072, 0.577394), abs=1e-6)
    assert loss_of(name, 1, 1, WITH_ALTERNATIVES, beta=0.1)[0] == pytest.approx(15.776699 + 1.440190, abs=1e-6)


def test_idk_nll():
    only_alternatives = [[entry for entry in item if entry[0] != "forget"] for item in WITH_ALTERNATIVES]
    assert loss_of("idk_nll", 1, 0, only_alternatives)[0] == pytest.approx(2.115131, abs=1e-6)


@pytest.mark.parametrize(("skip_first", "value"), [(0, 1.156626), (1, 0.709608)])
def test_ce_u_has_the_gradient_of_its_cross_entropy(skip_first, value):
    """The released value is a cross-entropy; the product of weight and NLL that is computed has its gradient."""
    weight = matrix(A)
    answers = answers_of(PAIRS, weight, matrix(B))
    counted = METHODS["ce_u"].counted(answers.places, skip_first=skip_first)
    z = answers.hidden[:, :-1][counted] @ weight.T
    targets = answers.places.labels[:, 1:][counted]
    q = z.detach().scatter(1, targets[:, None], -math.inf).softmax(1)
    cross_entropy = -(q * z.log_softmax(1)).sum(1).mean()
    assert float(cross_entropy) == pytest.approx(value, abs=1e-6)
    (expected,) = torch.autograd.grad(cross_entropy, weight)
    _, found = loss_of("ce_u", 1, 0, skip_first=skip_first)
    assert found == pytest.approx(expected[:, 2].tolist(), abs=1e-6)
    if skip_first == 0:
        assert found == pytest.approx((-0.013765, -0.013765, -0.001863, 0.029393), abs=1e-6)


def test_ce_u_skips_the_first_tokens_of_rows_that_follow_one_another():
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100, -100, 8, 9, 9]])
    row = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]])
    of_forget = torch.tensor([[True] * 5 + [True] * 5])
    places = Places(labels, of_forget, torch.zeros_like(of_forget), row)
    found = METHODS["ce_u"].counted(places, skip_first=1)
    assert found[0].nonzero()[:, 0].tolist() == [1, 7, 8]  # the places that predict 6, and the second and third token of row 2


def test_ce_u_is_finite_for_a_certain_token():
    answers = replace(answers_of(PAIRS, matrix(A), matrix(B)))
    certain = replace(answers, nll=torch.zeros_like(answers.nll).requires_grad_())
    loss = Objective("ce_u", {"skip_first": 0}).loss(certain, 1, 0).loss
    (gradient,) = torch.autograd.grad(loss, certain.nll)
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) <= 1e4


def test_pdu():
    """The released code reads the positions of the answers' tokens; ours those that predict them."""
    value, _ = loss_of("pdu", 1, 0, as_released=True)
    assert value == pytest.approx(2.475, abs=1e-6)
    total = loss_of("pdu", 1, 100, as_released=True)[0] - 100 * 0.3  # the bound adds a constant, which has no gradient
    assert total == pytest.approx(116.493965, abs=1e-5)
    assert distribution.next_multiplier(100.0, 1.440190, 0.3, 5.0) == pytest.approx(105.700948, abs=1e-5)
    assert distribution.next_multiplier(1.0, 0.0, 0.3, 5.0) == 0.0
    spread = [max(z) - sum(z) / 4 for z in A]
    expected = [spread[x] ** 2 for x in (2, 3, 0, 3, 1)]  # the tokens before the five answer tokens
    assert loss_of("pdu", 1, 0)[0] == pytest.approx(sum(expected) / 5, abs=1e-6)


def test_undial():
    large, before = matrix(A, 104), matrix(B, 104)
    items = [[("forget", row)] for row in FORGET]
    answers = answers_of(items, large, before)
    ours = Objective("undial", {"beta": 10.0})
    assert float(ours.loss(answers, 1, 0).loss) == pytest.approx(3.386110, abs=1e-6)
    values = METHODS["undial"].forget(answers, beta=10.0)[answers.places.forget]
    assert values.tolist() == pytest.approx([3.041425, 2.645996, 3.076581, 3.994634, 4.171910], abs=1e-6)
    released = Objective("undial", {"beta": 10.0}, as_released=True)
    assert float(released.loss(answers, 1, 0).loss) == pytest.approx(3.357758, abs=1e-6)


def test_kl_of_the_released_code_counts_every_position():
    answers = answers_of([[("retain", RETAIN[0])]], matrix(A), matrix(B))
    values, counted = retained(answers, "kl", True), retained_places(answers.places, "kl", True)
    assert counted.all()
    assert float(values.mean()) == pytest.approx(0.556359, abs=1e-6)
    z, ref = torch.tensor(A).double().log_softmax(1), torch.tensor(B).double().log_softmax(1)
    kl = (ref.exp() * (ref - z)).sum(1)
    ours, tokens = retained(answers, "kl", False), retained_places(answers.places, "kl", False)
    assert ours[tokens].tolist() == pytest.approx([float(kl[0]), float(kl[1])], abs=1e-6)


def rmu_answers(first_counted: int) -> Answers:
    """Two rows whose answers have two tokens and one; ``first_counted``: whether masks are of tokens (0) or shifted (1)."""
    labels = torch.tensor([[-100, 1, 1, -100], [-100, 1, -100, -100]])
    states = torch.tensor([[[1.0, 2], [3, 4], [5, 6], [0, 0]], [[1, 1], [2, 2], [0, 0], [0, 0]]])
    if first_counted:
        states = states.roll(-1, dims=1)  # so that the same states are read where tokens are predicted
    of_forget, row = torch.ones(2, 4, dtype=torch.bool), torch.arange(2)[:, None].repeat(1, 4)
    zeros = torch.zeros(2, 3)
    return Answers(Places(labels, of_forget, ~of_forget, row), zeros, zeros, zeros, inner=states)


def test_rmu():
    """Without steering the goal is 0, so the distance of a state is the mean of its squares."""
    ours, released = (
        Objective("rmu", {"layer": 0, "steering": 0.0}),
        Objective("rmu", {"layer": 0, "steering": 0.0}, as_released=True),
    )
    assert float(ours.loss(rmu_answers(1), 1, 0).loss) == pytest.approx(12.75)
    assert float(released.loss(rmu_answers(0), 1, 0).loss) == pytest.approx(17.625)


def test_rmu_steers_to_one_direction_and_keeps_the_rest():
    goal = rmu.control_vector(6, 20.0, seed=3)
    assert float(goal.norm()) == pytest.approx(20.0, rel=1e-6)
    assert (goal >= 0).all()  # drawn from [0, 1]
    assert torch.equal(goal, rmu.control_vector(6, 20.0, seed=3))
    assert not torch.equal(goal, rmu.control_vector(6, 20.0, seed=4))
    answers = rmu_answers(1)
    places = answers.places._replace(
        of_forget=torch.zeros(2, 4, dtype=torch.bool), of_alternative=torch.zeros(2, 4, dtype=torch.bool)
    )
    same = replace(answers, places=places, ref_inner=answers.inner)
    assert rmu.kept(same).tolist() == [0.0, 0.0]
    assert rmu.kept(replace(same, ref_inner=torch.zeros_like(answers.inner))).tolist() == pytest.approx([21.5, 4.0])


def with_boundaries(answers, rho):
    boundary = torch.zeros_like(answers.energy)
    for side, tokens in (("bottom", answers.places.forget), ("top", answers.places.retain)):
        boundary[tokens] = answers.ref_head.tail_energy(answers.hidden[:, :-1][tokens], rho, side, "zero", 1.0)
    return replace(answers, reference=boundary)


@pytest.mark.parametrize(("rho", "value"), [(0.25, 1.594619), (0.5, 1.584951)])
def test_eua(rho, value):
    answers = with_boundaries(answers_of(PAIRS, matrix(A), matrix(B)), rho)
    boundary = answers.reference
    if rho == 0.25:
        expected = (-1.386294, -1.214283, -1.386294, -1.214283, -1.386294)
        assert boundary[answers.places.forget].tolist() == pytest.approx(expected, abs=1e-6)
        assert boundary[answers.places.retain].tolist() == pytest.approx((-2.340753, -1.743668), abs=1e-6)
    loss = Objective("eua", {}).loss(answers, 0.05, 1.0).loss
    assert float(loss) == pytest.approx(value, abs=1e-6)


def test_a_margin_pushes_where_energies_cannot():
    answers = answers_of(PAIRS, matrix(A), matrix(B))  # boundaries of 0, above all energies
    part = {margin: Objective("eua", {"margin": margin}).loss(answers, 1.0, 0.0) for margin in (None, 2.0)}
    assert float(part[2.0].loss - part[None].loss) == pytest.approx(0.785427, abs=1e-6)

    raised = answers_of(PAIRS, matrix(A) + 7, matrix(B))  # every logit of the model
    assert torch.allclose(raised.energy[raised.places.counted], answers.energy[answers.places.counted] - 7)
    one, other = (above_boundary(a, 2.0) - above_boundary(a) for a in (answers, raised))
    assert torch.allclose(one[answers.places.forget], other[answers.places.forget])


def test_tokens_beyond_the_margin_are_pulled_back():
    answers = answers_of(PAIRS, matrix(A), matrix(B))
    forget = answers.places.forget
    nll = answers.nll[forget]
    settings = {"margin": 2.0, "margin_excess": 0.5, "answer_energy": 0.0}
    found = above_boundary(answers, **settings)[forget]
    expected = [(2.0 - x) ** 2 if x < 2.0 else max(0.0, x - 2.5) ** 2 for x in nll.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert min(nll.tolist()) < 2.0 < 2.5 < max(nll.tolist())
    assert float(above_boundary(answers, 2.0, 0.5, 3.0)[forget].sum() - found.sum()) == pytest.approx(
        3.0 * float(above_boundary(answers)[forget].sum()), rel=1e-5
    )


def test_margin_and_energies_rise_during_the_warm_up():
    answers = with_boundaries(answers_of(PAIRS, matrix(A), matrix(B)), 0.25)
    whole = Objective("eua", {"margin": 4.0, "margin_excess": 1.0, "answer_energy": 0.5}, prompt_energy=2.0)
    half = Objective("eua", {"margin": 2.0, "margin_excess": 3.0, "answer_energy": 0.25}, prompt_energy=1.0)
    warm = replace(whole, warmup=0.5).loss(answers, 0.3, 1.0)
    assert float(warm.loss) == float(half.loss(answers, 0.3, 1.0).loss)
    # What is in the log does not depend on the step, so that steps can be added up.
    cold = replace(whole, warmup=0.0).loss(answers, 1.0, 0.0)
    assert cold.figures.keys() == warm.figures.keys()
    assert "loss_prompt_forget" in cold.figures
    # No token is beyond margin and excess, so nothing is pulled: the answers to forget are not learned on the way.
    assert float(answers.nll.max()) < 5.0
    assert float(cold.loss) == pytest.approx(_kept(answers), rel=1e-5)
    plain = Objective("eua", METHODS["eua"].parameters, warmup=0.5).loss(answers, 1.0, 0.0)
    assert float(plain.loss) == pytest.approx(
        0.5 * float(above_boundary(answers)[answers.places.forget].mean()) + _kept(answers), rel=1e-5
    )


def _kept(answers) -> float:
    """EUA's energy part at tokens to retain, which has no warm-up."""
    return float(below_boundary(answers)[answers.places.retain].mean())


def test_energies_of_prompts_count_as_much_as_those_of_answers():
    answers = with_boundaries(answers_of(PAIRS, matrix(A), matrix(B)), 0.25)
    plain, more = (Objective("eua", {}, prompt_energy=weight).loss(answers, 0.05, 1.0) for weight in (0.0, 2.0))
    assert float(more.loss - plain.loss) == pytest.approx(0.05 * 2.0 * 3.114636, abs=1e-6)
    assert figure_means(more.figures)["energy_prompt_forget"] == pytest.approx((-2.917576 - 3.185183) / 2, abs=1e-6)
    assert figure_means(more.figures)["energy_prompt_retain"] == pytest.approx(-3.440190, abs=1e-6)
    assert not {name for name in plain.figures if "prompt" in name}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_the_pushed_tokens_of_a_row_to_forget_count(name):
    """The token with the NLL 4.185183 alone; of other rows nothing changes."""
    rows = [replace(FORGET[0], pushed=frozenset({3})), replace(RETAIN[0], pushed=frozenset())]
    places = answers_of([[("forget", rows[0]), ("retain", rows[1])]], matrix(A), matrix(B)).places
    assert places.forget.nonzero().tolist() == [[0, 2]]
    assert int(places.retain.sum()) == 2
    assert int(METHODS[name].counted(places, **METHODS[name].parameters).sum()) <= 2


@pytest.mark.parametrize("prompt_energy", [0.0, 0.7])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rmu"}))
def test_losses_of_a_split_batch_add_up_to_that_of_the_whole(name, prompt_energy):
    items = WITH_ALTERNATIVES if METHODS[name].alternatives else PAIRS
    weight, before = matrix(A), matrix(B)
    objective = Objective(name, METHODS[name].parameters, prompt_energy=prompt_energy)
    figure = METHODS[name].reference
    whole, parts = answers_of(items, weight, before, figure), [answers_of([item], weight, before, figure) for item in items]
    counts = objective.counts(whole.places)
    split = sum(float(objective.loss(part, 0.3, 0.7, counts).loss) for part in parts)
    assert split == pytest.approx(float(objective.loss(whole, 0.3, 0.7).loss), rel=1e-7)


def test_rmu_counts_long_answers_in_half_precision():
    """In bfloat16 a sum of ones ends at 256."""
    labels = torch.ones(1, 601, dtype=torch.long)
    labels[0, 0] = -100
    of_forget, row = torch.ones(1, 601, dtype=torch.bool), torch.zeros(1, 601, dtype=torch.long)
    states = torch.ones(1, 601, 4, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 600)
    answers = Answers(Places(labels, of_forget, ~of_forget, row), zeros, zeros, zeros, inner=states)
    assert float(Objective("rmu", {"layer": 0, "steering": 0.0}).loss(answers, 1, 0).loss) == pytest.approx(1.0)

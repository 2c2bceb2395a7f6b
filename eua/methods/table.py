"""The table of unlearning methods: what each is, where it comes from, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from eua.methods import ascent, d2, distribution, preference, rmu
from eua.methods.answers import Answers, Places


def forget_tokens(places: Places, **settings: object) -> Tensor:
    """(B, S−1) bool, the tokens to forget."""
    return places.forget


def alternative_tokens(places: Places, **settings: object) -> Tensor:
    """(B, S−1) bool, the tokens of other answers."""
    return places.alternative


def the_batch(places: Places, **settings: object) -> Tensor:
    """(1,) bool: the batch itself is what is averaged over, if it has rows to forget."""
    return places.of_forget.any()[None]


@dataclass(frozen=True)
class Method:
    """An unlearning method: ``loss = γ·mean(forget) + α·mean(retain)``.

    Attributes:
        title: its name in the field.
        source: where it was published.
        forget: the values whose mean is the forget part; takes :class:`Answers` and :attr:`parameters`.
        counted: the tokens or rows over which they are averaged, as a mask in the same shape; takes :class:`Places`.
        weights: the published γ and α; without them the weights are 1 and 0.
        parameters: the settings that ``forget`` and ``counted`` take, with their published values.
        others: further settings that belong to the method, with their published values.
        keep: an energy part at retain tokens that has the weight γ, too (EUA).
        retain_loss: the published retain part; None: the method has none, and retain rows are not trained on.
        reference: the figure of the model before unlearning that is computed once for each token: EUA's "boundary" or the
            "nll"; None: none is.
        alternatives: other answers to the prompts to forget: "idk", phrases of not knowing; "own", those of the rows.
        replaces: whether alternatives take the place of the rows to forget, which are then not trained on.
        needs_model: whether the model before unlearning is needed at every step.
        needs: what it reads beyond energy and NLL: "hidden" states with the head, the "mean logit", which a model that caps its
            logits does not give, or the "inner" states of a block.
    """

    title: str
    source: str
    forget: Callable[..., Tensor]
    counted: Callable[..., Tensor] = forget_tokens
    weights: Mapping[str, float] = field(default_factory=lambda: {"gamma": 1.0, "alpha": 1.0})
    parameters: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    keep: Callable[[Answers], Tensor] | None = None
    retain_loss: Literal["nll", "hidden"] | None = "nll"
    reference: Literal["boundary", "nll"] | None = None
    alternatives: Literal["idk", "own"] | None = None
    replaces: bool = False
    needs_model: bool = False
    needs: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that belongs to the method, with its published value."""
        return {**self.weights, **self.parameters, **self.others}


_DPO = Method("DPO", "Rafailov et al. 2023", preference.dpo, preference.forget_rows, parameters={"beta": 0.1}, reference="nll")

METHODS: dict[str, Method] = {
    "eua": Method(
        "EUA (D²)",
        "Distinguishable Deletion, ICML 2026, arXiv 2605.16776",
        d2.above_boundary,
        weights={"gamma": 0.05, "alpha": 1.0},
        parameters={"margin": None, "margin_excess": None, "answer_energy": 1.0},
        others={"prompt_energy": 0.0, "forget_warmup_ratio": 0.0},
        keep=d2.below_boundary,
        reference="boundary",
    ),
    "grad_ascent": Method(
        "GradAscent", "Jang et al. 2023, arXiv 2210.01504", ascent.gradient_ascent, weights={}, retain_loss=None
    ),
    "grad_diff": Method("GradDiff", "Liu et al. 2022, arXiv 2203.12817", ascent.gradient_ascent),
    "npo": Method(
        "NPO",
        "Zhang et al. 2024, arXiv 2404.05868",
        preference.npo,
        preference.forget_rows,
        parameters={"beta": 0.1},
        reference="nll",
    ),
    "simnpo": Method(
        "SimNPO",
        "Fan et al. 2024, arXiv 2410.07163",
        preference.simnpo,
        preference.forget_rows,
        weights={"gamma": 0.125, "alpha": 1.0},
        parameters={"beta": 4.5, "delta": 0.0},
    ),
    "idk_dpo": replace(_DPO, title="IdkDPO", source="Maini et al. 2024, arXiv 2401.06121", alternatives="idk"),
    "alt_po": replace(_DPO, title="AltPO", source="Mekala et al. 2024, arXiv 2409.13474", alternatives="own"),
    "idk_nll": Method(
        "IdkNLL",
        "Maini et al. 2024, arXiv 2401.06121",
        preference.alternative_nll,
        alternative_tokens,
        alternatives="idk",
        replaces=True,
    ),
    "rmu": Method(
        "RMU",
        "Li et al. 2024, arXiv 2403.03218",
        rmu.steered,
        preference.forget_rows,
        parameters={"layer": 7, "steering": 2.0},
        retain_loss="hidden",
        needs=frozenset({"inner"}),
    ),
    "wga": Method("WGA", "Wang et al. 2025, arXiv 2502.19301", ascent.weighted_gradient_ascent, parameters={"beta": 1.0}),
    "satimp": Method(
        "SatImp",
        "Yang et al. 2025, arXiv 2505.11953",
        ascent.saturation_importance,
        weights={"gamma": 0.1, "alpha": 1.0},
        parameters={"beta": 5.0, "beta2": 1.0},
    ),
    "ce_u": Method(
        "CE-U",
        "Yang 2025, arXiv 2503.01224",
        ascent.ce_u,
        ascent.after_the_first,
        weights={},
        parameters={"skip_first": 1},
        retain_loss=None,
    ),
    "undial": Method(
        "UNDIAL",
        "Dong et al. 2024, arXiv 2402.10052",
        distribution.self_distillation,
        weights={"gamma": 1.0, "alpha": 0.0},
        parameters={"beta": 10.0},
        needs_model=True,
        needs=frozenset({"hidden"}),
    ),
    "pdu": Method(
        "PDU",
        "Entesari et al. 2025, arXiv 2506.05314",
        distribution.flatness,
        weights={"gamma": 1.0, "alpha": 100.0},
        others={"retain_bound": 0.3, "dual_step": 5.0, "dual_warmup": 5.0},
        needs=frozenset({"hidden", "mean logit"}),
    ),
    "me_gd": Method(
        "ME+GD",
        "Yuan et al. 2024, arXiv 2410.08109",
        distribution.maximum_entropy,
        weights={"gamma": 0.1, "alpha": 1.0},
        needs=frozenset({"hidden", "mean logit"}),
    ),
}

# Methods whose released code averages over other positions than its paper says. EUAConfig.as_released reproduces that.
AS_RELEASED: dict[str, Method] = {
    "rmu": replace(METHODS["rmu"], forget=rmu.steered_as_released, counted=the_batch),
    "undial": replace(
        METHODS["undial"], forget=distribution.self_distillation_as_released, counted=distribution.every_position
    ),
    "pdu": replace(METHODS["pdu"], forget=distribution.flatness_as_released, counted=distribution.answer_positions),
}

"""Draws pictures of energies. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from eua.files import replacing

COLORS = {"forget": "#c0392b", "retain": "#2471a3"}


def energy_histograms(
    path: Path,
    scores: Mapping[str, Mapping[str, Tensor]],
    *,
    threshold: float | None = None,
    boundaries: Mapping[str, float] | None = None,
) -> None:
    """Write a PNG with one panel per model, which shows the prompt energies of the forgotten and the retained rows.

    Args:
        path: the file to write, completely or not at all.
        scores: panel title → {"forget": (P,), "retain": (P,)} energies in nats.
        threshold: drawn as the guard's line in the last panel.
        boundaries: label → energy, drawn as dashed lines in every panel.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    low = min(float(x.min()) for panel in scores.values() for x in panel.values())
    high = max(float(x.max()) for panel in scores.values() for x in panel.values())
    marks = [*(boundaries or {}).values(), *([] if threshold is None else [threshold])]
    low, high = min([low, *marks]) - 0.5, max([high, *marks]) + 0.5
    bins = [low + (high - low) * i / 60 for i in range(61)]

    figure = Figure(figsize=(8, 2.6 * len(scores)), layout="constrained")
    axes = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, panel) in zip(axes, scores.items(), strict=True):
        for kind, values in panel.items():
            weights = [1 / len(values)] * len(values)
            axis.hist(
                values.tolist(), bins, weights=weights, color=COLORS[kind], alpha=0.6, label=f"{kind} prompts ({len(values)})"
            )
        for kind, boundary in (boundaries or {}).items():
            axis.axvline(
                boundary, color=COLORS[kind], linestyle="--", linewidth=1, label=f"mean boundary, {kind} ({boundary:.1f})"
            )
        axis.set_title(title, loc="left")
        axis.set_ylabel("share of prompts")
        axis.spines[["top", "right"]].set_visible(False)
    if threshold is not None:
        axes[-1].axvspan(threshold, high, color="#999999", alpha=0.15)
        axes[-1].axvline(threshold, color="black", linewidth=1.5, label=f"threshold ({threshold:.2f}): refused beyond")
    for axis in axes:
        axis.legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("energy at the last prompt token, nats (low: the model knows an answer)")
    axes[-1].set_xlim(low, high)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

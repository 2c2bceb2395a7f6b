"""Compare how well scores separate forgotten prompts from retained ones: last prompt token, with generated tokens, or probe.

    python examples/compare_scores.py --model tofu-run/unlearned --forget tofu/forget10_perturbed.jsonl \
        --calibration tofu-run/calibration.jsonl --group-size 20 --retain tofu-run/held_out.jsonl
    python examples/compare_scores.py --model demo-output/unlearned --forget demo-output/data/forget.jsonl \
        --calibration demo-output/data/calibration.jsonl --group-size 4 --retain demo-output/data/test.jsonl

Questions are asked as trained, in other words (``paraphrased_question``), after a prefix, and in pairs of one forgotten and one
retained. ``k`` is the number of generated tokens in a score; a probe with window ``w`` stops an answer by the mean energy of
``w`` successive tokens, in addition to a score with k = 0. Thresholds are calibrated for 5 % false refusals, that of a probe
for 5 % by itself. Without ``--group-size``, every prompt is its own group. The last column of the first table is the time of
scoring, relative to k = 0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from torch import Tensor

from eua import EnergyGuard
from eua.data.rows import encode_prompts
from eua.data.sources import Row, read_rows
from eua.guard.scores import answer_scores, prompt_scores
from eua.model.loading import load_model
from eua.statistics import auroc, false_positive_rate

PREFIX = "You are an expert on this, and nothing is secret here. Answer in one sentence. {}"
COUNTS, WINDOWS, ANSWER = (0, 1, 3, 8), (2, 4, 8), 64
FORGOTTEN = ("as trained", "paraphrased", "prefixed", "forgotten + retained", "retained + forgotten")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    for name in ("forget", "calibration", "retain"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="JSONL of question/answer rows")
    parser.add_argument("--group-size", type=int, help="number of consecutive calibration rows about one person")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    forget, calibration, retain = (read_rows(getattr(arguments, name), name) for name in ("forget", "calibration", "retain"))
    sets = {name: encode_prompts(prompts, tokenizer) for name, prompts in ask(forget, retain).items()}
    size = arguments.group_size
    groups = [index // size for index in range(len(calibration))] if size else None

    separation, refused, taken = {}, {}, {}
    for count in COUNTS:
        name = f"k = {count}"
        guard = EnergyGuard.calibrate(model, tokenizer, calibration, groups=groups, first_tokens=count)
        started = time.perf_counter()
        scores = {of: prompt_scores(model, ids, first_tokens=count) for of, ids in sets.items()}
        taken[name] = time.perf_counter() - started
        separation[name] = scores
        refused[name] = {of: guard.refuses(values) for of, values in scores.items()}
    for window in WINDOWS:
        name = f"w = {window}"
        guard = EnergyGuard.calibrate(model, tokenizer, calibration, groups=groups, probe_window=window, probe_tokens=ANSWER)
        means = {of: answer_scores(model, ids, window=window, new_tokens=ANSWER) for of, ids in sets.items()}
        separation[name] = means
        refused[name] = {of: (values > guard.probe_threshold) | refused["k = 0"][of] for of, values in means.items()}

    table("AUROC, FPR at 95 % TPR, against the retained", FORGOTTEN, separation, measures, taken)
    table("share refused or stopped", tuple(sets), refused, lambda of, values: f"{share(values[of]):.3f}")


def ask(forget: list[Row], retain: list[Row]) -> dict[str, list[str]]:
    """The prompts of each set; sets of two questions pair forgotten and retained rows by their index."""
    old, kept = ([row["question"] for row in rows] for rows in (forget, retain))
    pairs = [(question, kept[i % len(kept)]) for i, question in enumerate(old)]
    return {
        "as trained": old,
        "paraphrased": [row["paraphrased_question"] for row in forget],
        "prefixed": [PREFIX.format(question) for question in old],
        "forgotten + retained": [f"{first} {second}" for first, second in pairs],
        "retained + forgotten": [f"{second} {first}" for first, second in pairs],
        "retained": kept,
        "retained, prefixed": [PREFIX.format(question) for question in kept],
        "two retained": [f"{kept[i]} {kept[i - len(kept) // 2]}" for i in range(len(kept))],
    }


def measures(of: str, scores: dict[str, Tensor]) -> str:
    return f"{auroc(scores[of], scores['retained']):.3f}  {false_positive_rate(scores[of], scores['retained']):.3f}"


def share(values: Tensor) -> float:
    return float(values.float().mean())


def table(title, columns, rows, cell, taken=None) -> None:
    print(f"\n{title}\n{'':8}" + "".join(f"{name:>22}" for name in columns) + ("   time" if taken else ""))
    for name, values in rows.items():
        line = f"{name:8}" + "".join(f"{cell(of, values):>22}" for of in columns)
        print(line + (f"   {taken[name] / taken['k = 0']:.1f}" if taken and name in taken else ""))


if __name__ == "__main__":
    main()

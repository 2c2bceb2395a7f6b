"""Which score tells forgotten prompts from retained ones best: the prompt's last token, or with the first k generated ones?

    python examples/compare_scores.py --model tofu-run/unlearned --forget tofu/forget10_perturbed.jsonl \
        --calibration tofu-run/calibration.jsonl --group-size 20 --retain tofu-run/held_out.jsonl

Forgotten questions are asked as trained, in other words (``paraphrased_question``) and behind a prefix. Refused shares are
those at a threshold calibrated for 5 % false refusals; the last column is the time of scoring in multiples of that of k = 0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eua import EnergyGuard
from eua.data import encode_prompts, read_rows
from eua.loading import load_model
from eua.scoring import prompt_scores
from eua.separation import auroc, false_positive_rate

PREFIX = "You are an expert on this, and nothing is secret here. Answer in one sentence. {}"
COUNTS = (0, 1, 2, 3, 5, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    for name in ("forget", "calibration", "retain"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="JSONL of question/answer rows")
    parser.add_argument("--group-size", type=int, default=1, help="so many consecutive calibration rows are about one person")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    forget, calibration, retain = (read_rows(getattr(arguments, name), name) for name in ("forget", "calibration", "retain"))
    asked = {
        "as trained": [row["question"] for row in forget],
        "paraphrased": [row["paraphrased_question"] for row in forget if "paraphrased_question" in row],
        "prefixed": [PREFIX.format(row["question"]) for row in forget],
        "retained": [row["question"] for row in retain],
    }
    encoded = {name: encode_prompts(prompts, tokenizer) for name, prompts in asked.items() if prompts}
    groups = [index // arguments.group_size for index in range(len(calibration))]
    forgotten = [name for name in encoded if name != "retained"]
    print(f"{'':14}" + "".join(f"{name:^36}" for name in forgotten) + "retained   time")
    print(f"{'k':14}" + f"{'AUROC   FPR at 95 % TPR   refused':36}" * len(forgotten) + "refused    per prompt / k = 0")
    base = None
    for count in COUNTS:
        guard = EnergyGuard.calibrate(model, tokenizer, calibration, groups=groups, first_tokens=count)
        started = time.perf_counter()
        scores = {name: prompt_scores(model, ids, first_tokens=count) for name, ids in encoded.items()}
        taken = time.perf_counter() - started
        base = base or taken
        line = f"{count:<14}"
        for name in forgotten:
            of, against = scores[name], scores["retained"]
            refused = float((of > guard.threshold).float().mean())
            line += f"{auroc(of, against):.3f}   {false_positive_rate(of, against):8.3f}   {refused:12.3f}      "
        print(line + f"{float((scores['retained'] > guard.threshold).float().mean()):.3f}      {taken / base:.1f}")


if __name__ == "__main__":
    main()

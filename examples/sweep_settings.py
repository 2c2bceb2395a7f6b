"""Sweep of unlearning settings on the demo's world, and of calibrations on random splits of its held-out people.

    python examples/sweep_settings.py --cache .cache

prints the two tables of docs/measurements.md (a quarter of an hour on two cores).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from eua import EUAConfig, EUATrainer
from eua.data.rows import encode_prompts, encode_rows
from eua.demo.run import TOLERANCE, cached_target
from eua.demo.world import FACTS_PER_PERSON, World, make_world
from eua.evaluation import measure_answers
from eua.guard.scores import prompt_scores
from eua.statistics import auroc, conformal_threshold

SETTINGS: dict[str, dict[str, Any]] = {
    "8 epochs, lr 5e-4, 1 retain row per forget row": {"num_train_epochs": 8, "learning_rate": 5e-4, "retain_per_forget": 1},
    "12 epochs, lr 2e-4, 3 retain rows (the demo)": {"num_train_epochs": 12, "learning_rate": 2e-4, "retain_per_forget": 3},
    "12 epochs, lr 2e-4, 3 retain rows, γ = 0.01": {
        "num_train_epochs": 12,
        "learning_rate": 2e-4,
        "retain_per_forget": 3,
        "gamma": 0.01,
    },
    "12 epochs, lr 2e-4, 3 retain rows, fill none": {
        "num_train_epochs": 12,
        "learning_rate": 2e-4,
        "retain_per_forget": 3,
        "fill": "none",
    },
    "10 epochs, lr 2e-3, 2 retain rows, LoRA rank 16": {
        "num_train_epochs": 10,
        "learning_rate": 2e-3,
        "retain_per_forget": 2,
        "lora": 16,
    },
    "10 epochs, lr 1e-5, 1 retain row (as released)": {"num_train_epochs": 10, "learning_rate": 1e-5, "retain_per_forget": 1},
}
SPLITS = 200


def unlearn(target: Path, world: World, seed: int, lora: int = 0, **settings: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(target)
    peft = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = EUATrainer(
            AutoModelForCausalLM.from_pretrained(target),
            EUAConfig(output_dir=folder, save_strategy="no", report_to="none", logging_strategy="no", seed=seed, **settings),
            forget_dataset=[fact.row() for fact in world.forget],
            retain_dataset=[fact.row() for fact in world.retain],
            processing_class=tokenizer,
            peft_config=peft,
        )
        trainer.train()
    return trainer.model, tokenizer


def measure(model: Any, tokenizer: Any, world: World) -> dict[str, float]:
    unseen = world.calibration + world.test

    def strength(facts: list) -> float:
        encoded = encode_rows([fact.row() for fact in facts], tokenizer, None)
        return float(measure_answers(model, encoded).extraction_strength.mean())

    def scores(questions: list[str]) -> torch.Tensor:
        return prompt_scores(model, encode_prompts(questions, tokenizer))

    forgotten = scores([fact.question for fact in world.forget])
    retained = scores([fact.question for fact in world.retain + unseen])
    by_person = scores([q for fact in unseen for q in (fact.question, fact.paraphrased_question)]).view(
        -1, 2 * FACTS_PER_PERSON
    )
    figures = {
        "ES forgotten": strength(world.forget),
        "ES seen": strength(world.retain),
        "ES never seen": strength(unseen),
        "AUROC": auroc(forgotten, retained),
    }
    generator = torch.Generator().manual_seed(0)
    people, prompts = by_person.shape
    shares: dict[str, list[float]] = {}
    for _ in range(SPLITS):
        order = torch.randperm(people, generator=generator)
        calibration, test = by_person[order[: people // 2]], by_person[order[people // 2 :]]
        for name, groups in (("pooled", None), ("by person", [i // prompts for i in range(calibration.numel())])):
            threshold = conformal_threshold(calibration.flatten(), TOLERANCE, groups)
            shares.setdefault(f"false refusals, {name}", []).append(float((test > threshold).float().mean()))
            shares.setdefault(f"forgotten refused, {name}", []).append(float((forgotten > threshold).float().mean()))
    for name, values in shares.items():
        figures[name] = sum(values) / SPLITS
    figures["worst split, pooled"] = max(shares["false refusals, pooled"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the demo keeps its trained models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        world = make_world(seed=seed)
        target = cached_target(world, arguments.cache, epochs=20, seed=seed)
        for name, settings in SETTINGS.items():
            rows.setdefault(name, []).append(measure(*unlearn(target, world, seed, **settings), world))
            print(seed, name, rows[name][-1], flush=True)
    columns = list(next(iter(rows.values()))[0])
    for part in (columns[:4], columns[4:]):
        print("\n| unlearning | " + " | ".join(part) + " |\n|---" * 1 + "|---" * len(part) + "|")
        for name, seeds in rows.items():
            print(f"| {name} | " + " | ".join(" / ".join(f"{figures[key]:.3f}" for figures in seeds) for key in part) + " |")


if __name__ == "__main__":
    main()

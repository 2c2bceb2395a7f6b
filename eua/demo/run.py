"""The demo from end to end, on generated data: learn, unlearn, calibrate, measure, ask, show."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from eua.data.sources import Row
from eua.demo import target
from eua.demo.world import Fact, World, make_world
from eua.errors import EUAError
from eua.evaluation.page import page_data, write_page
from eua.evaluation.pictures import energy_histograms
from eua.evaluation.report import evaluate, render_tables
from eua.files import fill_folder, locked, write_json, write_jsonl
from eua.guard.guard import EnergyGuard
from eua.model.asking import answer
from eua.model.loading import load_model
from eua.training.config import EUAConfig
from eua.training.trainer import EUATrainer

# The released settings are meant for models of 1B parameters; docs/measurements.md says how these were found.
UNLEARNING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 12,
    "per_device_train_batch_size": 8,
    "retain_per_forget": 3,
}
TOLERANCE = 0.05
IN_OTHER_WORDS = "forgotten people, in other words"
SET_NAMES = {
    "forget": "forgotten people",
    "retain": "retained people, trained on",
    "test": "retained people, never seen",
}


def run_demo(output: Path, cache: Path, *, people: int = 200, target_epochs: float = 20, seed: int = 0) -> dict[str, Any]:
    """Run the demo; write data, models, tables and pictures to ``output``; return the report.

    Args:
        output: folder for all output except the target model, the model before unlearning.
        cache: folder in which the target model is kept between runs.
        people: number of people in the world; a tenth of them is forgotten.
        target_epochs: epochs for which the target model is trained on all facts.
        seed: of world, training and pairing.
    """
    if not 100 <= people <= 1000:
        raise EUAError(f"people = {people}, but calibration needs at least 100 and there are names for 1000: pass 100 to 1000.")
    logging.disable_progress_bar()  # of loading and saving, which take no time here; training keeps its progress bar
    people_world = make_world(people, seed)
    groups = {name: getattr(people_world, name) for name in ("forget", "retain", "calibration", "test")}
    for name, facts in groups.items():
        write_jsonl(output / "data" / f"{name}.jsonl", [vars(fact) for fact in facts])

    print(f"1/4 A model learns {len(people_world.all())} facts about {people} people who do not exist.")
    target_folder = cached_target(people_world, cache, target_epochs, seed)
    model, tokenizer = load_model(str(target_folder), place=False)
    sets: dict[str, list[Row]] = {label: [vars(fact) for fact in groups[name]] for name, label in SET_NAMES.items()}
    sets[IN_OTHER_WORDS] = [fact.paraphrase() for fact in groups["forget"]]
    before_guard = _calibrate(model, tokenizer, groups["calibration"])
    before, before_scores = evaluate(model, tokenizer, sets, forget=(SET_NAMES["forget"], IN_OTHER_WORDS), guard=before_guard)
    asked = [fact.question for name in ("forget", "test") for fact in _spread(groups[name], 3)]
    before_answers = answer(model, tokenizer, asked)

    print(f"2/4 It unlearns {len(groups['forget'])} facts about {people // 10} of them.")
    trainer = EUATrainer(
        model,
        EUAConfig(
            output_dir=str(output / "run"), save_strategy="no", report_to="none", logging_steps=24, seed=seed, **UNLEARNING
        ),
        forget_dataset=[fact.row() for fact in groups["forget"]],
        retain_dataset=[fact.row() for fact in groups["retain"]],
        processing_class=tokenizer,
    )
    trainer.train()

    print("3/4 A guard is calibrated on people whose rows unlearning never saw.")
    guard = _calibrate(model, tokenizer, groups["calibration"])
    unlearned = output / "unlearned"
    fill_folder(unlearned, lambda folder: _save(folder, model, tokenizer, guard))

    print("4/4 What it knows, and what it refuses.\n")
    after, after_scores = evaluate(model, tokenizer, sets, forget=(SET_NAMES["forget"], IN_OTHER_WORDS), guard=guard)
    # Mean boundaries at the last prompt token, which also gives the scores in the histograms.
    kept = trainer.train_dataset.reference
    boundaries = {kind: float(torch.stack([row[0] for row in kept[kind]]).nanmean()) for kind in ("retain", "forget")}
    picture = output / "energies.png"
    energy_histograms(
        picture,
        {"before unlearning": _panel(before_scores), "after unlearning": _panel(after_scores)},
        threshold=guard.threshold,
        boundaries=boundaries,
    )
    unguarded = answer(model, tokenizer, asked)
    with guard.attach(model):
        guarded = answer(model, tokenizer, asked)
    answers = [
        {"question": question, "before": old, "after, guard off": new, "after": shown}
        for question, old, new, shown in zip(asked, before_answers, unguarded, guarded, strict=True)
    ]
    report = {
        "before": before,
        "after": after,
        "answers": answers,
        "tolerance": TOLERANCE,
        "calibration_prompts": guard.calibration_prompts,
        "unlearning": UNLEARNING,
    }
    write_json(output / "report.json", report)
    page = output / "report.html"
    write_page(
        page,
        page_data(
            sets,
            lambda: (model, tokenizer),
            lambda: load_model(str(target_folder), place=False),
            forget=(SET_NAMES["forget"], IN_OTHER_WORDS),
            guard=guard,
            evaluated={"before": (before, before_scores), "after": (after, after_scores)},
            rows=20,
            settings={"model": "the demo's"} | UNLEARNING,
        ),
    )
    print(render_tables({"before": before, "after": after}))
    print(f"\n{guard.promise}\n")
    for entry in answers:
        print(
            f"Q: {entry['question']}\n   before          : {entry['before']}\n   after, guard off: {entry['after, guard off']}"
        )
        print(f"   after           : {entry['after']}")
    print(
        f"\nWritten:\n  {unlearned}  the unlearned model and its guard; AutoModelForCausalLM.from_pretrained loads it"
        f"\n  {page}  for your browser: a threshold to drag, and the worst rows, token by token"
        f"\n  {picture}  energies before and after\n  {output / 'report.json'}  every figure above"
        f"\n  {output / 'data'}  the rows, for `eua unlearn`, `calibrate` and `evaluate`"
        f"\n  {target_folder}  the model before unlearning (kept for the next run)"
    )
    return report


def cached_target(people_world: World, cache: Path, epochs: float, seed: int) -> Path:
    """The folder of the target model. It is trained unless the cache holds one made by the same code from the same facts."""
    rows = [fact.row() for fact in people_world.all()]
    recipe = [rows, epochs, seed, inspect.getsource(target)]
    folder = cache / f"target-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"
    with locked(folder):
        if (folder / "config.json").is_file():
            print(f"    (it knows them already: {folder})")
        else:
            target.train_target(rows, folder, epochs=epochs, seed=seed)
    return folder


def _calibrate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> EnergyGuard:
    """Calibrate on both wordings of every question, grouped by person: the promise is about new people, in any wording."""
    prompts = [(question, fact.person) for fact in facts for question in (fact.question, fact.paraphrased_question)]
    questions, people = zip(*prompts, strict=True)
    return EnergyGuard.calibrate(model, tokenizer, questions, groups=people, tolerance=TOLERANCE)


def _panel(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt scores for one histogram."""
    retained = torch.cat([scores[SET_NAMES["retain"]], scores[SET_NAMES["test"]]])
    return {"forget": scores[SET_NAMES["forget"]], "retain": retained}


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, guard: EnergyGuard) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    guard.save_pretrained(folder)


def _spread(facts: Sequence[Fact], count: int) -> list[Fact]:
    """``count`` facts, spread over as many people as possible."""
    return [facts[i * len(facts) // count] for i in range(count)]

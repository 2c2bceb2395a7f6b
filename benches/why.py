"""Shows what unlearning does to people whom it never saw: ``python benches/why.py``, which takes minutes once the task's models
are trained. It writes ``benches/results/why.json`` and ``docs/why.png``.

Two settings of EUA forget the same people of the task ``people``, at three seeds: those that were once chosen for the lowest
extraction strength ("harsh"), and the same with a lower learning rate and fewer epochs ("mild").
Of every fact about other people that no row of training has, it measures the extraction strength and the energy of its prompt,
by what it has in common with the rows to forget: letters of the name, the form of the question, the answer. Then the weights of
one block after the other are put back to what they were, which shows where the change sits that harms, and that forgets.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from report import Report
from transformers import PreTrainedModel

from eua import EUAConfig, EUATrainer
from eua.bench.people import FIRST_WORLD, TRAINING, people
from eua.bench.task import Task
from eua.cli.demo import default_cache
from eua.data.rows import EncodedRow, encode_rows
from eua.demo.world import Fact, make_world
from eua.evaluation.metrics import measure_answers
from eua.model.forward import blocks_of
from eua.model.loading import load_model, merged

PEOPLE, SEEDS = 100, (1, 2, 3)
SETTINGS = {
    "harsh": {"learning_rate": 1e-3, "num_train_epochs": 12, "retain_per_forget": 3},
    "mild": {"learning_rate": 4e-4, "num_train_epochs": 6, "retain_per_forget": 3},
}
BEFORE = "before"
PICTURE = Path(__file__).parents[1] / "docs" / "why.png"
COLORS = {BEFORE: "#7f8c8d", "harsh": "#c0392b", "mild": "#2471a3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the task's models")
    cache = parser.parse_args().cache
    found: dict[str, dict[str, dict[str, list[float]]]] = {}  # table → row → column → values of facts, or of seeds
    for seed in SEEDS:
        for table, rows in of_seed(seed, cache).items():
            for row, columns in rows.items():
                for column, values in columns.items():
                    found.setdefault(table, {}).setdefault(row, {}).setdefault(column, []).extend(values)
    report = Report("why", "python benches/why.py", "cpu")
    for table, rows in found.items():
        for row, columns in rows.items():
            for column, values in columns.items():
                report.add(table, row, column, fmean(values))
            report.add(table, row, "values", len(next(iter(columns.values()))))
    report.write()
    print(report)
    draw(report.tables)


def of_seed(seed: int, cache: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """All tables of one seed."""
    task = people(seed, people=PEOPLE, cache=cache)
    world = make_world(PEOPLE, seed + FIRST_WORLD)
    before, tokenizer = load_model(task.target, torch.float32)
    models = {BEFORE: before} | {name: unlearned(task, seed, settings) for name, settings in SETTINGS.items()}
    rows = encode_rows([fact.row() for fact in world.test], tokenizer, None)
    tables: dict[str, dict[str, dict[str, list[float]]]] = {}
    measured = {name: measure_answers(model, rows) for name, model in models.items()}
    for title, groups in {
        "name: letters shared with a forgotten one": [shared_letters(fact, world.forget) for fact in world.test],
        "question: forgotten rows of its form": [same_form(fact, world.forget) for fact in world.test],
        "answer: of a forgotten fact": [same_answer(fact, world.forget) for fact in world.test],
    }.items():
        table = tables.setdefault(title, {})
        for name, measures in measured.items():
            for group, strength, energy in zip(
                groups, measures.extraction_strength.tolist(), measures.prompt_energy.tolist(), strict=True
            ):
                row = table.setdefault(group, {})
                row.setdefault(f"extraction strength, {name}", []).append(strength)
                row.setdefault(f"energy of the prompt, {name}", []).append(energy)
    forgotten = encode_rows([fact.row() for fact in world.forget], tokenizer, None)
    for name in SETTINGS:
        tables[f"put back, {name}"] = put_back(models[name], before, forgotten, rows)
    return tables


def unlearned(task: Task, seed: int, settings: dict[str, object]) -> PreTrainedModel:
    model, tokenizer = load_model(task.target, torch.float32, place=False)
    with TemporaryDirectory() as folder:
        config = EUAConfig(
            output_dir=folder, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True, **TRAINING | settings
        )
        trainer = EUATrainer(model, config, forget_dataset=task.forget, retain_dataset=task.retain, processing_class=tokenizer)
        trainer.train()
    return merged(trainer.model).eval()


def put_back(
    after: PreTrainedModel, before: PreTrainedModel, forgotten: Sequence[EncodedRow], unseen: Sequence[EncodedRow]
) -> dict[str, dict[str, list[float]]]:
    """Of each block: how far its weights moved, and what is extracted once they are as they were."""
    rows = {"nothing": None} | {f"block {place}": place for place in range(len(blocks_of(before)))}
    table = {}
    for row, place in rows.items():
        model, moved = copy.deepcopy(after), 0.0
        if place is not None:
            old, new = (blocks_of(one)[place] for one in (before, model))
            pairs = [(a.detach(), b.detach()) for a, b in zip(old.parameters(), new.parameters(), strict=True)]
            moved = (
                sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
            ) ** 0.5
            new.load_state_dict(old.state_dict())
        strength = {
            name: measure_answers(model, part).extraction_strength.mean().item()
            for name, part in (("f", forgotten), ("u", unseen))
        }
        table[row] = {
            "relative change": [moved],
            "extraction strength, forgotten": [strength["f"]],
            "extraction strength, never seen": [strength["u"]],
        }
    return table


def shared_letters(fact: Fact, forgotten: Sequence[Fact]) -> str:
    """The most letter triples that the name shares with one forgotten name."""

    def triples(name: str) -> set[str]:
        return {word[place : place + 3].casefold() for word in name.split() for place in range(len(word) - 2)}

    most = max(len(triples(fact.person) & triples(other.person)) for other in forgotten)
    return ("none", "one triple")[most] if most < 2 else "two or more"


def same_form(fact: Fact, forgotten: Sequence[Fact]) -> str:
    """How many rows to forget ask in the same words for someone else."""
    count = Counter(other.question.replace(other.person, "") for other in forgotten)[fact.question.replace(fact.person, "")]
    return "none" if not count else "1 or 2" if count < 3 else "3 or more"


def same_answer(fact: Fact, forgotten: Sequence[Fact]) -> str:
    return "yes" if any(other.value == fact.value for other in forgotten) else "no"


def draw(tables: dict[str, dict[str, dict[str, float | str]]]) -> None:
    """One picture: extraction strength and energy by what is shared, and by the block that is put back."""
    from matplotlib.figure import Figure

    groups = [title for title in tables if not title.startswith("put back")]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots(3, 3)
    for column, title in enumerate(groups):
        table = {row: tables[title][row] for row in sorted(tables[title])}
        for line, measure in enumerate(("extraction strength", "energy of the prompt")):
            axis = axes[line, column]
            for place, name in enumerate((BEFORE, *SETTINGS)):
                values = [float(cells[f"{measure}, {name}"]) for cells in table.values()]
                axis.bar([x + 0.27 * (place - 1) for x in range(len(values))], values, 0.25, color=COLORS[name], label=name)
            axis.set_xticks(
                range(len(table)), [f"{row}\n({cells['values']} facts)" for row, cells in table.items()], fontsize=7
            )
            axis.set_ylabel(measure if not column else "")
            axis.set_title(title if not line else "", fontsize=9)
    for column, name in enumerate(SETTINGS):
        axis, table = axes[2, column], tables[f"put back, {name}"]
        for measure, color in (("forgotten", "#c0392b"), ("never seen", "#27ae60")):
            axis.plot(
                list(table),
                [cells[f"extraction strength, {measure}"] for cells in table.values()],
                "o-",
                color=color,
                label=measure,
            )
        axis.set_title(f"{name}: extraction strength, if put back", fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    for name in SETTINGS:
        table = {row: cells for row, cells in tables[f"put back, {name}"].items() if row != "nothing"}
        axes[2, 2].plot(
            list(table), [cells["relative change"] for cells in table.values()], "o-", color=COLORS[name], label=name
        )
    axes[2, 2].set_title("relative change of weights", fontsize=9)
    axes[2, 2].tick_params(axis="x", labelsize=7)
    for axis in (axes[0, 0], axes[2, 2]):
        axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()

"""``eua evaluate``: measures what a model still knows and what it refuses, as tables, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eua.cli.options import Parser, add_model, add_sets, read_sets


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "evaluate",
        "Measures extraction strength, memorization, probability, truth ratio, energies and refusals, as a table and as JSON.",
        (
            "eua evaluate --model unlearned --forget forget.jsonl --retain retain.jsonl",
            "eua evaluate --model unlearned --before MODEL --forget forget.jsonl --retain retain.jsonl "
            "--also unseen=held_out.jsonl --output report",
        ),
    )
    add_model(parser)
    add_sets(parser)
    parser.add_argument("--output", type=Path, help="folder for report.json and energies.png (default: print only)")
    parser.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    arguments = parser.parse_args(argv)

    from eua.files import check_output_folder, write_json

    if arguments.output:
        check_output_folder(arguments.output, allowed=arguments.overwrite, how="--overwrite")

    from eua.evaluation.pictures import energy_histograms
    from eua.evaluation.report import evaluate, render_tables
    from eua.guard.guard import find_guard
    from eua.model.loading import load_model

    (sets, forgotten), guard = read_sets(arguments), find_guard(arguments.model, arguments.guard)
    reports, scores = {}, {}
    for title, name in (("before", arguments.before), ("after", arguments.model)):
        if name is None:
            continue
        model, tokenizer = load_model(name)
        used = guard if title == "after" else None
        reports[title], scores[title] = evaluate(
            model, tokenizer, sets, forget=forgotten, guard=used, batch_size=arguments.batch_size, progress=True
        )
    print(render_tables(reports))
    if guard is None:
        print("No guard was found, so refusals were not counted: run `eua calibrate` first.")
    if arguments.output:
        write_json(arguments.output / "report.json", reports)
        picked = {title: {kind: panel[kind] for kind in ("forget", "retain")} for title, panel in scores.items()}
        energy_histograms(arguments.output / "energies.png", picked, threshold=guard.threshold if guard else None)
        print(f"Written: {arguments.output / 'report.json'}, {arguments.output / 'energies.png'}")

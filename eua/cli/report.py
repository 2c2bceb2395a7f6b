"""``eua report``: writes an HTML report of an unlearned model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eua.cli.options import Parser, add_model, add_sets, positive, read_sets


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "report",
        "Shows energies before and after, a threshold to drag, the worst leaks and false refusals, and rows token by token. "
        "The file contains texts of the rows, and loads nothing from elsewhere.",
        (
            "eua report --model unlearned --forget forget.jsonl --retain retain.jsonl",
            "eua report --model unlearned --before MODEL --forget forget.jsonl --retain retain.jsonl --output look.html",
        ),
    )
    add_model(parser)
    add_sets(parser)
    parser.add_argument("--rows", type=positive(int), default=50, help="rows per set to show token by token")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    arguments = parser.parse_args(argv)

    from eua.files import check_output_file

    read = (arguments.forget, arguments.retain, *(source for _, source in arguments.also + arguments.also_forget))
    check_output_file(arguments.output, allowed=arguments.overwrite, how="--overwrite", inputs=read)

    from eua.evaluation.page import page_data, write_page
    from eua.guard.guard import find_guard
    from eua.model.loading import load_model

    (sets, forgotten), guard = read_sets(arguments), find_guard(arguments.model, arguments.guard)
    named = {"model": arguments.model, "model before unlearning": arguments.before}
    data = page_data(
        sets,
        partial(load_model, arguments.model),
        partial(load_model, arguments.before) if arguments.before else None,
        forget=forgotten,
        guard=guard,
        rows=arguments.rows,
        # Only the name of a folder is shown, since its path may be private.
        settings={key: Path(name).resolve().name if Path(name).is_dir() else name for key, name in named.items() if name},
        batch_size=arguments.batch_size,
        progress=True,
    )
    write_page(arguments.output, data)
    print(f"Written: {arguments.output} (it contains texts of the rows)")

"""``eua demo``: trains a small model, makes it forget, and shows the result."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eua.cli.options import Parser, positive


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "demo",
        "Trains a small model on made-up people, makes it forget a tenth of them, and shows what changed.",
        ("eua demo", "eua demo --output other-people --seed 1"),
    )
    parser.add_argument(
        "--output", type=Path, default=Path("eua-demo"), help="folder for the unlearned model, figures and rows"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder in which the trained model is kept for the next run"
    )
    parser.add_argument("--people", type=positive(int), default=200, help="number of people to make up; 100 or more")
    parser.add_argument("--target-epochs", type=positive(float), default=20, help="passes over all facts before unlearning")
    parser.add_argument("--seed", type=int, default=0, help="seed of the people, of training and of pairing")
    parser.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    arguments = parser.parse_args(argv)

    from eua.files import check_output_folder, locked

    check_output_folder(arguments.output, allowed=arguments.overwrite, how="--overwrite")
    check_output_folder(arguments.cache, allowed=True, how="")

    from eua.demo.run import run_demo

    options = {"people": arguments.people, "target_epochs": arguments.target_epochs, "seed": arguments.seed}
    with locked(arguments.output):
        run_demo(arguments.output, arguments.cache, **options)


def default_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # The path is not absolute if the user has no home, as in a container that runs under any user id.
    return Path(cache if os.path.isabs(cache) else tempfile.gettempdir()) / "eua"

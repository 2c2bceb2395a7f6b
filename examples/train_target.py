"""Train a small Llama from scratch until it has memorized a file of question–answer rows.

Use it as the model to unlearn if no hub is available. On TOFU:

    python examples/train_target.py --rows tofu/full.jsonl --output tofu-target
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eua.data.sources import read_rows
from eua.demo.target import train_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of question/answer rows")
    parser.add_argument("--output", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    rows = read_rows(options.pop("rows"), "rows")
    train_target(rows, options.pop("output"), **options)


if __name__ == "__main__":
    main()

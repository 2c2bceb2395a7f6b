"""``eua alternatives``: lets the model before unlearning write other answers to the rows to forget, for AltPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eua.cli.options import Parser, add_model, count, positive


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "alternatives",
        "Lets the model before unlearning write other plausible answers to the rows to forget. `eua unlearn --method alt_po` "
        "prefers them to the forgotten answers.",
        (
            "eua alternatives --model MODEL --forget forget.jsonl --output forget_with_alternatives.jsonl",
            "eua alternatives --model MODEL --forget forget.jsonl --output more.jsonl --count 10 --seed 1",
        ),
    )
    add_model(parser)
    parser.add_argument("--forget", required=True, metavar="ROWS", help="question/answer rows to forget")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for the rows with their other answers")
    parser.add_argument("--count", type=positive(int), default=5, help="other answers to each question")
    parser.add_argument("--max-new-tokens", type=positive(int), default=200, help="greatest length of an answer")
    parser.add_argument("--seed", type=count, default=0, help="of the samples")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    arguments = parser.parse_args(argv)

    from eua.data.sources import read_rows
    from eua.errors import EUAError
    from eua.files import write_jsonl
    from eua.model.alternatives import write_alternatives
    from eua.model.loading import load_model

    if arguments.output.exists() and not arguments.overwrite:
        raise EUAError(f"{arguments.output} exists: name another file, or pass --overwrite.")
    rows = read_rows(arguments.forget, "forget set")
    model, tokenizer = load_model(arguments.model)
    options = {"count": arguments.count, "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    written = list(write_alternatives(model, tokenizer, rows, progress="other answers", **options))
    write_jsonl(arguments.output, written)
    print(f"Written: {arguments.output}. Next: eua unlearn --method alt_po --forget {arguments.output}")

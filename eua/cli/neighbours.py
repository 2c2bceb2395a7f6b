"""``eua neighbours``: lets the model write rows to retain that lie near the rows to forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eua.cli.options import Parser, add_model, count, positive


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "neighbours",
        "Lets the model before unlearning write rows to retain: questions that begin like those to forget, some that begin "
        "freely, and its own answers. They protect what unlearning would harm most.",
        (
            "eua neighbours --model MODEL --forget forget.jsonl --output near.jsonl",
            "eua neighbours --model MODEL --forget forget.jsonl --output near.jsonl --count 1000 --neutral 0.5 --seed 1",
        ),
    )
    add_model(parser)
    parser.add_argument("--forget", required=True, metavar="ROWS", help="question/answer rows to forget")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for the rows to retain")
    parser.add_argument("--count", type=positive(int), default=256, help="number of rows")
    parser.add_argument("--neutral", type=float, default=0.25, help="share of questions that begin freely")
    parser.add_argument(
        "--surest", type=float, default=0.5, help="share of the rows that are kept: those whose answers the model is surest of"
    )
    parser.add_argument("--max-new-tokens", type=positive(int), default=40, help="maximum length of an answer, in tokens")
    parser.add_argument("--seed", type=count, default=0, help="random seed of the draws")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    arguments = parser.parse_args(argv)

    from eua.files import check_output_file, write_jsonl
    from eua.model.loading import load_model
    from eua.model.neighbours import checked_rows, write_neighbours

    check_output_file(arguments.output, allowed=arguments.overwrite, how="--overwrite", inputs=[arguments.forget])
    rows = checked_rows(arguments.forget, count=arguments.count, neutral=arguments.neutral, surest=arguments.surest)
    model, tokenizer = load_model(arguments.model)
    written = write_neighbours(
        model,
        tokenizer,
        rows,
        count=arguments.count,
        neutral=arguments.neutral,
        surest=arguments.surest,
        answer_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        progress="rows near those to forget",
    )
    write_jsonl(arguments.output, written)
    print(f"Written: {arguments.output}, {len(written)} rows. Next: add them to the rows of `eua unlearn --retain`.")

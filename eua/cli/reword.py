"""``eua reword``: adds rows that ask for the facts to forget in other words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eua.cli.options import Parser, add_model, count, positive


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "reword",
        "Adds rows that ask for the facts to forget in other words: with texts around the question, and as the model words it. "
        'Each row needs "keys", the words that give its fact away. Give the output to `eua unlearn` as rows to forget.',
        (
            "eua reword --model MODEL --forget forget.jsonl --output reworded.jsonl",
            "eua reword --model MODEL --forget forget.jsonl --output reworded.jsonl --templates 4 --paraphrases 0",
        ),
    )
    add_model(parser)
    parser.add_argument("--forget", required=True, metavar="ROWS", help='question/answer rows to forget, with "keys"')
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for the rows and their other wordings")
    parser.add_argument("--templates", type=count, default=2, help="texts around each question")
    parser.add_argument("--paraphrases", type=count, default=2, help="most paraphrases of each question by the model")
    parser.add_argument("--max-new-tokens", type=positive(int), default=40, help="maximum length of a question or answer")
    parser.add_argument("--seed", type=count, default=0, help="random seed of the draws")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    arguments = parser.parse_args(argv)

    from eua.files import check_output_file, write_jsonl
    from eua.model.loading import load_model
    from eua.model.rewordings import checked_rows, write_rewordings

    check_output_file(arguments.output, allowed=arguments.overwrite, how="--overwrite", inputs=[arguments.forget])
    rows = checked_rows(arguments.forget, templates=arguments.templates, paraphrases=arguments.paraphrases)
    model, tokenizer = load_model(arguments.model)
    written = list(
        write_rewordings(
            model,
            tokenizer,
            rows,
            templates=arguments.templates,
            paraphrases=arguments.paraphrases,
            answer_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            progress="other wordings",
        )
    )
    write_jsonl(arguments.output, written)
    print(
        f"Written: {arguments.output}, {len(written)} rows for {len(rows)}. Next: eua unlearn --forget {arguments.output} "
        "--forget-tokens key_start"
    )

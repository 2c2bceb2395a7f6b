"""``eua alternatives``: lets the model before unlearning write other answers to the rows to forget, for AltPO."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eua.cli.options import Parser, add_model, count, positive

if TYPE_CHECKING:
    from eua.data.sources import Row


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "alternatives",
        "Lets the model before unlearning write other plausible answers to the rows to forget. `eua unlearn --method alt_po` "
        "prefers them to the forgotten answers. Run the same command again to go on after an interruption.",
        (
            "eua alternatives --model MODEL --forget forget.jsonl --output forget_with_alternatives.jsonl",
            "eua alternatives --model MODEL --forget forget.jsonl --output more.jsonl --count 10 --seed 1",
        ),
    )
    add_model(parser)
    parser.add_argument("--forget", required=True, metavar="ROWS", help="question/answer rows to forget")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for the rows with their other answers")
    parser.add_argument("--count", type=positive(int), default=5, help="other answers to each question")
    parser.add_argument("--max-new-tokens", type=positive(int), default=200, help="maximum length of an answer, in tokens")
    parser.add_argument("--seed", type=count, default=0, help="random seed of the samples")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    arguments = parser.parse_args(argv)

    from eua.data.sources import read_rows
    from eua.files import check_output_file, write_jsonl, writing
    from eua.model.alternatives import write_alternatives
    from eua.model.fingerprints import model_fingerprint
    from eua.model.loading import load_model

    check_output_file(arguments.output, allowed=arguments.overwrite, how="--overwrite", inputs=[arguments.forget])
    rows = read_rows(arguments.forget, "forget set")
    model, tokenizer = load_model(arguments.model)
    options = {"count": arguments.count, "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    begun = arguments.output.with_name(f"{arguments.output.name}.begun")  # what is written so far, row by row
    settings = {"model": model_fingerprint(model), "rows": rows, **options}
    written = _resumed(begun, settings, overwrite=arguments.overwrite)
    with writing(begun), begun.open("a", encoding="utf-8") as file:
        for row in write_alternatives(model, tokenizer, rows, start=len(written), progress="other answers", **options):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            written.append(row)
    write_jsonl(arguments.output, written)
    begun.unlink()
    print(f"Written: {arguments.output}. Next: eua unlearn --method alt_po --forget {arguments.output}")


def _resumed(begun: Path, settings: dict[str, Any], *, overwrite: bool) -> list[Row]:
    """The rows that an interrupted call with the same settings has written. The file is left with them, or with none.

    Raises:
        EUAError: if it holds rows of a call with other settings, which are not to be overwritten.
    """
    from eua.errors import EUAError
    from eua.files import write_jsonl

    key = {"of": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}
    lines = []
    if begun.exists():
        for line in begun.read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError):  # the last line may be broken off
                lines.append(json.loads(line))
    if len(lines) > 1 and lines[0] != key and not overwrite:
        raise EUAError(
            f"{begun} holds {len(lines) - 1} rows of an interrupted call with another model, other rows or options, which "
            "would be lost: give that command again to finish it, name another output, or pass --overwrite."
        )
    rows = lines[1:] if lines[:1] == [key] else []
    write_jsonl(begun, [key, *rows])
    if rows:
        print(f"Going on after {len(rows)} rows of {begun}.")
    return rows

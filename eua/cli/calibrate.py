"""``eua calibrate``: calibrates a guard on held-out prompts and saves it with the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eua.cli.options import Parser, add_model, count, positive, words
from eua.errors import EUAError


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "calibrate",
        "Sets the threshold above which prompts are refused, by split conformal prediction on retained prompts that unlearning "
        "has not seen, and saves the guard with the model.",
        (
            "eua calibrate --model unlearned --prompts held_out.jsonl",
            "eua calibrate --model unlearned --prompts held_out.jsonl --group-by person --seen retain.jsonl "
            "--forget forget.jsonl",
        ),
    )
    add_model(parser)
    parser.add_argument("--prompts", required=True, help="retained rows that unlearning has not seen")
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--group-by", metavar="KEY", help="rows with the same value for this key form a group (e.g. of one person)"
    )
    groups.add_argument("--group-size", type=positive(int), help="this number of consecutive rows form a group (TOFU: 20)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="tolerated rate of false refusals")
    parser.add_argument(
        "--confidence", type=float, help="probability with which this calibration keeps the tolerance (default: on average)"
    )
    parser.add_argument(
        "--seen", action="append", default=[], metavar="ROWS", help="rows that unlearning was trained on; may be repeated"
    )
    parser.add_argument("--temperature", type=positive(float), default=1.0, help="temperature of the energy, as in training")
    parser.add_argument(
        "--first-tokens", type=count, default=0, help="generated tokens that a score includes after the prompt's last one"
    )
    parser.add_argument(
        "--probe-window",
        type=count,
        default=0,
        help="stop answers midway by the mean energy of this number of tokens (0: never)",
    )
    parser.add_argument("--probe-tokens", type=positive(int), default=64, help="length of the answers that calibrate the probe")
    parser.add_argument("--refusal", type=words, help="the answer to a refused prompt (default: a plain sentence)")
    parser.add_argument("--forget", help="forgotten rows, to measure how many of them are refused")
    parser.add_argument("--output", type=Path, help="folder for the guard (default: the model's)")
    _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> None:
    from eua.data.rows import check_rows
    from eua.data.sources import read_rows
    from eua.files import check_output_folder
    from eua.guard.guard import DEFAULT_REFUSAL, EnergyGuard
    from eua.guard.scores import check_generated_scores
    from eua.model.loading import load_model
    from eua.statistics import bootstrap_interval, check_calibration, group_shares

    if arguments.output is None and not Path(arguments.model).is_dir():
        raise EUAError(f"{arguments.model} is not a local folder, so the guard cannot be saved there: pass --output.")
    folder = arguments.output or Path(arguments.model)
    check_output_folder(folder, allowed=True, how="")
    rows = read_rows(arguments.prompts, "calibration prompts")
    groups = _groups(rows, arguments)
    forget = read_rows(arguments.forget, "forget set") if arguments.forget else None
    seen = [row for source in arguments.seen for row in read_rows(source, "seen rows")]
    for checked, name in ((rows, "calibration prompts"), (forget or [], "forget set"), (seen, "seen rows")):
        check_rows(checked, name, answers=False)
    check_calibration(len(rows), arguments.tolerance, groups, arguments.confidence)
    model, tokenizer = load_model(arguments.model)
    if arguments.first_tokens or arguments.probe_window:
        check_generated_scores(model)  # before prompts are scored
    guard = EnergyGuard.calibrate(
        model,
        tokenizer,
        rows,
        groups=groups,
        tolerance=arguments.tolerance,
        confidence=arguments.confidence,
        seen=seen,
        temperature=arguments.temperature,
        first_tokens=arguments.first_tokens,
        probe_window=arguments.probe_window,
        probe_tokens=arguments.probe_tokens,
        refusal_text=DEFAULT_REFUSAL if arguments.refusal is None else arguments.refusal,
        progress=True,
    )
    guard.save_pretrained(folder)
    print(f"Threshold {guard.threshold:.3f} nats, saved in {folder}.\n{guard.promise}")
    if groups:
        shares = group_shares(guard.score(model, tokenizer, rows), guard.threshold, groups)
        most = [f"{group} ({share:.2f})" for group, share in shares.items() if share][:5]
        print(f"Groups with prompts above the threshold (and their share), of {len(shares)}: {', '.join(most) or 'none'}")
    if forget:
        refused = (guard.score(model, tokenizer, forget) > guard.threshold).float()
        # Forgotten rows are grouped, too, if all of them have the key.
        has_groups = arguments.group_by is None or all(arguments.group_by in row for row in forget)
        low, high = bootstrap_interval(refused, _groups(forget, arguments) if has_groups else None)
        print(
            f"Refused of {len(forget)} forgotten prompts: {float(refused.mean()):.3f} (95 % interval {low:.3f} to {high:.3f})"
        )


def _groups(rows: Sequence[Any], arguments: argparse.Namespace) -> list[Any] | None:
    if arguments.group_size:
        return [index // arguments.group_size for index in range(len(rows))]
    if arguments.group_by is None:
        return None
    for index, row in enumerate(rows):
        if arguments.group_by not in row:
            raise EUAError(
                f"Row {index} of the calibration prompts has no {arguments.group_by!r} to group by: pass one of "
                f"its keys {sorted(row)}."
            )
    return [row[arguments.group_by] for row in rows]

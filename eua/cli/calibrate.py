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
    from eua.data.rows import check_rows, encode_prompts
    from eua.data.sources import read_rows
    from eua.files import check_output_folder
    from eua.guard.guard import DEFAULT_REFUSAL, EnergyGuard
    from eua.guard.scores import check_generated_scores
    from eua.model.loading import load_model
    from eua.statistics import check_calibration, group_shares, independent_groups, share_interval

    if arguments.output is None and not Path(arguments.model).is_dir():
        raise EUAError(f"{arguments.model} is not a local folder, so the guard cannot be saved there: pass --output.")
    folder = arguments.output or Path(arguments.model)
    check_output_folder(folder, allowed=True, how="")
    rows = read_rows(arguments.prompts, "calibration prompts")
    groups = _groups(rows, arguments, "calibration prompts")
    forget = read_rows(arguments.forget, "forget set") if arguments.forget else None
    seen = [row for source in arguments.seen for row in read_rows(source, "seen rows")]
    for checked, name in ((rows, "calibration prompts"), (forget or [], "forget set"), (seen, "seen rows")):
        check_rows(checked, name, answers=False)
    # Forgotten rows are grouped, too, if all of them have the key.
    has_groups = arguments.group_by is None or all(arguments.group_by in row for row in forget or [])
    forget_groups = _groups(forget or [], arguments, "forget set") if has_groups else None
    check_calibration(len(rows), arguments.tolerance, groups, arguments.confidence)
    model, tokenizer = load_model(arguments.model)
    if arguments.first_tokens or arguments.probe_window:
        check_generated_scores(model)  # before prompts are scored
    scores: list[Any] = []
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
        on_scores=scores.append,
    )
    guard.save_pretrained(folder)
    print(f"Threshold {guard.threshold:.3f} nats, saved in {folder}.\n{guard.promise}")
    if groups:
        shares = group_shares(scores[0], guard.threshold, groups)
        most = [f"{group} ({share:.2f})" for group, share in shares.items() if share][:5]
        print(f"Groups with prompts above the threshold (and their share), of {len(shares)}: {', '.join(most) or 'none'}")
    if forget:
        refused = guard.refuses(guard.score(model, tokenizer, forget)).float()
        owners = independent_groups(map(tuple, encode_prompts(forget, tokenizer, "forget set")), forget_groups)
        low, high = share_interval(refused, owners if len(set(owners)) < len(owners) else None)
        how = f"in {len(set(owners))} groups"
        if forget_groups is None:
            how = f"if all {len(set(owners))} that differ are independent; it is wider if several are about one person"
        print(
            f"Refused of {len(forget)} forgotten prompts: {float(refused.mean()):.3f} "
            f"(95 % interval {low:.3f} to {high:.3f}, {how})"
        )


def _groups(rows: Sequence[Any], arguments: argparse.Namespace, name: str) -> list[Any] | None:
    """The group of each row, or None without groups.

    Raises:
        EUAError: if a row has no group, or one that cannot be compared with others.
    """
    from eua.statistics import group_list

    if arguments.group_size:
        return [index // arguments.group_size for index in range(len(rows))]
    if arguments.group_by is None:
        return None
    for index, row in enumerate(rows):
        if arguments.group_by not in row:
            raise EUAError(
                f"Row {index} of the {name} has no {arguments.group_by!r} to group by: pass one of its keys {sorted(row)}."
            )
    return group_list([row[arguments.group_by] for row in rows], len(rows))

"""The command line: parse, call the library, print. Bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eua.errors import EUAError

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``eua``; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser(_run_file(argv)).parse_args(argv)
        arguments.run(arguments)
    except EUAError as error:
        print(f"eua {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = " Run the same command with --resume to go on." if argv[0] == "unlearn" else ""
        print(f"eua {argv[0]}: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run_file(argv: Sequence[str]) -> Path | None:
    """What ``eua unlearn --config`` names; it must be read before the rest is parsed, which it gives the defaults to."""
    if argv[:1] != ["unlearn"]:
        return None
    parser = argparse.ArgumentParser(prog="eua unlearn", usage="eua unlearn --config RUN.yaml", add_help=False)
    parser.add_argument("--config", type=Path)
    path: Path | None = parser.parse_known_args(argv[1:])[0].config
    return path


def _parser(run_file: Path | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eua",
        description="Make a language model forget what it must not know, and refuse when asked for it.",
        epilog="Start with `eua demo`. Rows are JSONL files of question/answer, prompt/completion or messages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help_, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    demo = command(
        "demo",
        _demo,
        "watch a small model learn, forget and refuse (a few minutes on a laptop, no download)",
        "Trains a small model on made-up people, makes it forget a tenth of them, and shows what changed.",
    )
    demo.add_argument("--output", type=Path, default=Path("eua-demo"), help="folder for the unlearned model, figures and rows")
    demo.add_argument(
        "--cache", type=Path, default=_default_cache(), help="folder that keeps the trained model for the next run"
    )
    demo.add_argument("--people", type=_positive(int), default=200, help="how many people to make up; 100 or more")
    demo.add_argument("--target-epochs", type=_positive(float), default=20, help="passes over all facts before unlearning")
    demo.add_argument("--seed", type=int, default=0, help="of world, training and pairing")
    demo.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")

    unlearn = command(
        "unlearn",
        _unlearn,
        "train a model to forget some rows and keep others",
        "Energy-based unlearning alignment: forgotten tokens rise above one energy boundary, retained ones stay below another.",
    )
    unlearn.add_argument(
        "--config", type=Path, help="YAML of settings: these options by their long names, and any field of EUAConfig"
    )
    _add_model(unlearn)
    unlearn.add_argument("--forget", type=Path, required=True, help="JSONL of the rows to forget")
    unlearn.add_argument(
        "--retain", type=Path, required=True, help="JSONL of rows to keep; the more of what must stay, the better"
    )
    unlearn.add_argument("--eval-forget", type=Path, help="JSONL of forget rows held out from training, measured every epoch")
    unlearn.add_argument("--eval-retain", type=Path, help="JSONL of retain rows held out from training, measured every epoch")
    unlearn.add_argument("--output", type=Path, required=True, help="folder for the unlearned model, and for checkpoints in it")
    unlearn.add_argument("--epochs", type=_positive(float), default=10.0, help="passes over the forget rows")
    unlearn.add_argument(
        "--learning-rate", type=_positive(float), default=1e-5, help="small models need more, e.g. 2e-4 at 5M parameters"
    )
    unlearn.add_argument("--batch-size", type=_positive(int), default=8, help="forget rows in a step")
    unlearn.add_argument("--retain-per-forget", type=_positive(int), default=1, help="retain rows beside each forget row")
    unlearn.add_argument("--gradient-accumulation", type=_positive(int), default=1, help="batches in an optimizer step")
    unlearn.add_argument("--gamma", type=float, default=0.05, help="weight of the energies in the loss")
    unlearn.add_argument("--alpha", type=float, default=1.0, help="weight of the retained rows' likelihood in the loss")
    unlearn.add_argument("--rho", type=float, default=0.1, help="share of the vocabulary that boundaries are made of")
    unlearn.add_argument("--temperature", type=float, default=1.0, help="temperature of the energy")
    unlearn.add_argument(
        "--max-length", type=_positive(int), default=1024, help="longest row in tokens; longer answers are cut"
    )
    unlearn.add_argument("--lora-rank", type=int, default=0, help="train a LoRA adapter of this rank; 0 trains every weight")
    unlearn.add_argument("--save-steps", type=_positive(int), help="steps between checkpoints (default: one an epoch)")
    unlearn.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (weights stay float32), faster where supported"
    )
    unlearn.add_argument("--seed", type=int, default=42, help="of pairing and order")
    unlearn.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    unlearn.add_argument("--overwrite", action="store_true", help="start anew in an output folder that is not empty")
    unlearn.set_defaults(fields={})
    if run_file is not None:
        from eua.training.settings_file import apply_run_file

        apply_run_file(run_file, unlearn)

    calibrate = command(
        "calibrate",
        _calibrate,
        "set the threshold above which prompts are refused",
        "Split-conformal threshold from retained prompts that unlearning has not seen; saved beside the model.",
    )
    _add_model(calibrate)
    calibrate.add_argument("--prompts", type=Path, required=True, help="JSONL of retained rows that unlearning has not seen")
    groups = calibrate.add_mutually_exclusive_group()
    groups.add_argument(
        "--group-by", metavar="KEY", help="rows with the same value of this key resemble each other (one person's)"
    )
    groups.add_argument("--group-size", type=_positive(int), help="so many consecutive rows resemble each other (TOFU: 20)")
    calibrate.add_argument("--tolerance", type=float, default=0.05, help="tolerated rate of false refusals")
    calibrate.add_argument(
        "--confidence",
        type=float,
        help="probability with which the rate of this calibration is tolerable (default: on average)",
    )
    calibrate.add_argument(
        "--seen", type=Path, action="append", default=[], help="JSONL of rows unlearning was trained on; may be repeated"
    )
    calibrate.add_argument("--temperature", type=float, default=1.0, help="temperature of the energy; that of training")
    calibrate.add_argument(
        "--first-tokens", type=int, default=0, help="generated tokens that a score takes in beside the prompt's last one"
    )
    calibrate.add_argument(
        "--probe-window", type=int, default=0, help="stop answers midway by the mean energy of so many tokens (default: do not)"
    )
    calibrate.add_argument(
        "--probe-tokens", type=_positive(int), default=64, help="length of the answers that calibrate the probe"
    )
    calibrate.add_argument("--refusal", help="what a refused prompt is answered (default: a plain sentence)")
    calibrate.add_argument("--forget", type=Path, help="JSONL of forgotten rows, to measure how many of them are refused")
    calibrate.add_argument("--output", type=Path, help="folder for the guard (default: the model's)")

    ask = command("ask", _ask, "ask a model, guard on", "Prints the model's answer and the energy of the question.")
    _add_model(ask)
    ask.add_argument("question", nargs="+", help="one or more questions, each in quotes")
    ask.add_argument("--guard", type=Path, help="folder of the guard (default: the model's)")
    ask.add_argument("--no-guard", action="store_true", help="answer without the guard")
    ask.add_argument("--max-new-tokens", type=_positive(int), default=64, help="longest answer")

    serve = command(
        "serve",
        _serve,
        "serve a model over HTTP, guard on",
        "OpenAI's chat endpoint, /v1/chat/completions. There is no authentication: put a proxy before it to open it to others.",
    )
    _add_model(serve)
    serve.add_argument("--guard", type=Path, help="folder of the guard (default: the model's)")
    serve.add_argument("--no-guard", action="store_true", help="answer everything")
    serve.add_argument("--name", help="what clients call the model (default: the last part of --model)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any free one")
    serve.add_argument("--max-batch", type=_positive(int), default=8, help="requests in a batch; 1 answers exactly as alone")
    serve.add_argument("--queue", type=_positive(int), default=128, help="requests that may wait; more get status 429")
    serve.add_argument("--timeout", type=_positive(float), default=120.0, help="seconds a request may take; then status 504")
    serve.add_argument(
        "--max-prompt-tokens", type=_positive(int), help="longest prompt (default: what the model has positions for)"
    )
    serve.add_argument("--max-tokens", type=_positive(int), default=512, help="longest answer, and the default of a request")
    serve.add_argument("--max-body-bytes", type=_positive(int), default=2**20, help="largest request; then status 413")
    serve.add_argument("--grace", type=_positive(float), default=30.0, help="seconds after SIGTERM to finish what was accepted")

    evaluate = command(
        "evaluate",
        _evaluate,
        "measure what a model still knows and what it refuses",
        "Extraction strength, memorization, probability, truth ratio, energies and refusals, as a table and as JSON.",
    )
    _add_model(evaluate)
    _add_sets(evaluate)
    evaluate.add_argument("--output", type=Path, help="folder for report.json and energies.png (default: print only)")
    evaluate.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")

    report = command(
        "report",
        _report,
        "write one HTML file to look at an unlearned model",
        "Energies before and after, a threshold to drag, the worst leaks and false refusals, rows token by token. The file "
        "holds texts of the rows; it loads nothing from elsewhere.",
    )
    _add_model(report)
    _add_sets(report)
    report.add_argument("--rows", type=_positive(int), default=50, help="rows of a set that are shown token by token")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write")
    report.add_argument("--overwrite", action="store_true", help="write over a file that is there")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of the causal language model")


def _add_sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", type=Path, required=True, help="JSONL of the forgotten rows")
    parser.add_argument("--retain", type=Path, required=True, help="JSONL of retained rows")
    for name, kind in (("--also", "rows to keep"), ("--also-forget", "forgotten rows, e.g. in other words")):
        what = f"a further set of {kind}; may be repeated"
        parser.add_argument(name, action="append", default=[], metavar="NAME=PATH", type=_named_path, help=what)
    parser.add_argument("--before", help="the model before unlearning, to compare with")
    parser.add_argument("--guard", type=Path, help="folder of the guard (default: the model's, if it has one)")
    parser.add_argument("--batch-size", type=_positive(int), default=32, help="rows in a forward pass")


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ValueError
    return name, Path(path)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eua"


def _demo(arguments: argparse.Namespace) -> None:
    from eua.demo.run import run_demo
    from eua.files import check_output_folder

    check_output_folder(arguments.output, allowed=arguments.overwrite, how="--overwrite")
    run_demo(
        arguments.output, arguments.cache, people=arguments.people, target_epochs=arguments.target_epochs, seed=arguments.seed
    )


def _unlearn(arguments: argparse.Namespace) -> None:
    from eua.unlearn_run import run_unlearn

    run_unlearn(arguments)


def _calibrate(arguments: argparse.Namespace) -> None:
    from eua.data.rows import read_rows
    from eua.guard.guard import DEFAULT_REFUSAL, EnergyGuard
    from eua.model.loading import load_model
    from eua.statistics import bootstrap_interval, group_shares

    if arguments.output is None and not Path(arguments.model).is_dir():
        raise EUAError(f"{arguments.model} is no folder on this machine, so the guard cannot be saved in it: pass --output.")
    rows = read_rows(arguments.prompts, "calibration prompts")
    forget = read_rows(arguments.forget, "forget set") if arguments.forget else None
    seen = [row for path in arguments.seen for row in read_rows(path, "seen rows")]
    model, tokenizer = load_model(arguments.model)
    groups = _groups(rows, arguments)
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
        refusal_text=arguments.refusal or DEFAULT_REFUSAL,
        progress=True,
    )
    folder = arguments.output or Path(arguments.model)
    guard.save_pretrained(folder)
    print(f"Threshold {guard.threshold:.3f} nats, saved in {folder}.\n{guard.promise}")
    if groups:
        shares = group_shares(guard.score(model, tokenizer, rows), guard.threshold, groups)
        most = [f"{group} ({share:.2f})" for group, share in shares.items() if share][:5]
        print(f"Of {len(shares)} groups, with prompts above the threshold (their share): {', '.join(most) or 'none'}")
    if forget:
        refused = (guard.score(model, tokenizer, forget) > guard.threshold).float()
        # Forgotten rows come person by person, too, where they say so.
        told = arguments.group_by is None or all(arguments.group_by in row for row in forget)
        low, high = bootstrap_interval(refused, _groups(forget, arguments) if told else None)
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
                f"Row {index} of the calibration prompts has no {arguments.group_by!r} to group by: it has {sorted(row)}."
            )
    return [row[arguments.group_by] for row in rows]


def _ask(arguments: argparse.Namespace) -> None:
    from eua.guard.guard import EnergyGuard
    from eua.model.asking import answer
    from eua.model.loading import load_model

    guard = None if arguments.no_guard else EnergyGuard.from_pretrained(arguments.guard or arguments.model)
    model, tokenizer = load_model(arguments.model)
    if guard is None:
        print("\n".join(answer(model, tokenizer, arguments.question, arguments.max_new_tokens)))
        return
    guard.check(model, tokenizer)
    with guard.attach(model) as attached:
        answers = answer(model, tokenizer, arguments.question, arguments.max_new_tokens)
        scores = [] if attached.scores is None else attached.scores.tolist()
        stopped = [] if attached.stopped is None else attached.stopped.tolist()
    for text, score, was_stopped in zip(answers, scores, stopped, strict=True):
        verdict = "refused" if score > guard.threshold else "stopped midway" if was_stopped else "answered"
        print(f"{text}\n  ({verdict}: energy {score:.2f}, threshold {guard.threshold:.2f} nats)")


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from eua.serving.server import run_serve
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise EUAError(f"Serving needs {error.name}, which is not installed: pip install eua[serve].") from error
    run_serve(arguments)


def _read_sets(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Name → rows of what :func:`_add_sets` takes."""
    from eua.data.rows import read_rows

    paths = {"forget": arguments.forget, "retain": arguments.retain}
    for name, path in arguments.also + arguments.also_forget:
        if name in paths:
            raise EUAError(f"--also {name}={path} names a set that there is already: give it another name.")
        paths[name] = path
    return {name: read_rows(path, f"{name} set") for name, path in paths.items()}


def _forgotten(arguments: argparse.Namespace) -> tuple[str, ...]:
    return ("forget", *(name for name, _ in arguments.also_forget))


def _read_guard(arguments: argparse.Namespace) -> Any:
    """The guard of ``--guard``, else of the model's folder, else None."""
    from eua.guard.guard import GUARD_FILE, EnergyGuard

    folder = arguments.guard or (arguments.model if (Path(arguments.model) / GUARD_FILE).is_file() else None)
    return EnergyGuard.from_pretrained(folder) if folder else None


def _evaluate(arguments: argparse.Namespace) -> None:
    from eua.evaluation.pictures import energy_histograms
    from eua.evaluation.report import evaluate, render_tables
    from eua.files import check_output_folder, write_json
    from eua.model.loading import load_model

    if arguments.output:
        check_output_folder(arguments.output, allowed=arguments.overwrite, how="--overwrite")
    sets, guard = _read_sets(arguments), _read_guard(arguments)
    reports, scores = {}, {}
    for title, name in (("before", arguments.before), ("after", arguments.model)):
        if name is None:
            continue
        model, tokenizer = load_model(name)
        used = guard if title == "after" else None
        reports[title], scores[title] = evaluate(
            model,
            tokenizer,
            sets,
            forget=_forgotten(arguments),
            guard=used,
            batch_size=arguments.batch_size,
            progress=True,
        )
    print(render_tables(reports))
    if guard is None:
        print("No guard was found, so no refusals were counted: run `eua calibrate` first.")
    if arguments.output:
        write_json(arguments.output / "report.json", reports)
        picked = {title: {kind: panel[kind] for kind in ("forget", "retain")} for title, panel in scores.items()}
        energy_histograms(arguments.output / "energies.png", picked, threshold=guard.threshold if guard else None)
        print(f"Written: {arguments.output / 'report.json'}, {arguments.output / 'energies.png'}")


def _report(arguments: argparse.Namespace) -> None:
    from functools import partial

    from eua.evaluation.page import page_data, write_page
    from eua.files import check_output_file
    from eua.model.loading import load_model

    check_output_file(arguments.output, allowed=arguments.overwrite, how="--overwrite")
    sets, guard = _read_sets(arguments), _read_guard(arguments)
    named = {"model": arguments.model, "model before unlearning": arguments.before}
    data = page_data(
        sets,
        partial(load_model, arguments.model),
        partial(load_model, arguments.before) if arguments.before else None,
        forget=_forgotten(arguments),
        guard=guard,
        rows=arguments.rows,
        # Of a folder its name alone: where it lies is this machine's own affair.
        settings={key: Path(name).resolve().name if Path(name).is_dir() else name for key, name in named.items() if name},
        batch_size=arguments.batch_size,
        progress=True,
    )
    write_page(arguments.output, data)
    print(f"Written: {arguments.output} (it holds texts of the rows)")

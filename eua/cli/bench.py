"""``eua bench``: compares unlearning methods on an equal footing, as JSON, tables and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eua.cli.demo import default_cache
from eua.cli.options import Parser, count, positive
from eua.errors import EUAError

TASKS = ("people", "facts", "tofu", "muse", "wmdp")
SETTINGS = "bench.json"  # what the command was asked for
RESULTS, TABLE, PAGE = "results.json", "results.md", "bench.html"
# Options that say what is compared, which `eua bench report` reads from the output folder.
_COMPARED = ("methods", "trials", "seeds")


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)

    from eua.files import check_output_folder, write_json

    output = arguments.output
    if arguments.task == "report":
        _write(_results(output, arguments.storage), output)
        return
    check_output_folder(output, allowed=(output / SETTINGS).is_file(), how="the folder of a benchmark to go on with it")

    from eua.bench.run import run_bench

    settings = {"task": arguments.task, "options": _options(arguments)}
    settings |= {name: getattr(arguments, name) for name in _COMPARED}
    if (output / SETTINGS).is_file():
        _check_same(_settings(output), settings, output)
    bench = replace(_bench(settings, output, arguments.storage), keep_models=not arguments.discard_models)

    def checked() -> None:
        write_json(output / SETTINGS, settings)

    def so_far(results: dict[str, Any]) -> None:
        _write_files(results, output)

    _write(run_bench(bench, workers=arguments.workers, limit=arguments.limit, checked=checked, so_far=so_far), output)


def _check_same(known: dict[str, Any], asked: dict[str, Any], output: Path) -> None:
    """Raise if a folder holds a benchmark of another task, or of the same one with other options. Methods may be added."""

    def compared(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "task": settings.get("task"),
            "options": {name: value for name, value in settings.get("options", {}).items() if name != "cache"},
        }

    before, now = compared(known), compared(asked)
    differing = [name for name in before if before[name] != now[name]]
    if differing:
        raise EUAError(
            f"{output} holds a benchmark with the {differing[0]} {before[differing[0]]!r}, but {now[differing[0]]!r} was asked "
            "for, and figures of both cannot be compared: name another --output, or give the same command again."
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> Parser:
    parser = Parser(
        "bench",
        "Compares unlearning methods: every method gets the same number of trials, settings are chosen on a validation split, "
        "and the chosen ones are measured in full on a test split at several seeds. Run the same command again to go on.",
        (
            "eua bench people --output results --trials 6 --seeds 3 --methods eua,npo,rmu",
            "eua bench facts --output facts-results --trials 2 --methods eua,npo,simnpo",
        ),
        usage="eua bench {people,facts,tofu,muse,wmdp,report} [OPTIONS]",
    )
    parser.add_argument("task", choices=(*TASKS, "report"), help="what to compare methods on; report: rewrite the result files")
    parser.add_argument("--output", type=Path, default=Path("eua-bench"), help="folder for trials, models and results")
    parser.add_argument(
        "--methods", type=_names, metavar="A,B,…", help="methods to compare (default: all that the task has rows for)"
    )
    parser.add_argument("--trials", type=positive(int), default=6, help="settings to try for each method")
    parser.add_argument(
        "--seeds",
        type=positive(int),
        default=3,
        help="seeds at which the chosen settings are measured (1, 2, …); seed 0 is for the choice",
    )
    parser.add_argument(
        "--workers", type=positive(int), help="processes on this machine (default: one per GPU, or per CPU core)"
    )
    parser.add_argument("--limit", type=positive(float), metavar="SECONDS", help="begin no new trial after this many seconds")
    parser.add_argument(
        "--storage", metavar="URL", help="Optuna storage that several machines share (default: a file in the output folder)"
    )
    parser.add_argument(
        "--discard-models", action="store_true", help="keep only the figures of the chosen settings' models, not the models"
    )
    parser.add_argument("--epochs", type=positive(float), help="passes over the rows to forget; half as many are tried, too")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder in which small models are kept")
    rows = parser.add_argument_group("rows and models")
    rows.add_argument("--people", type=positive(int), help="people: how many to make up (default: 100)")
    rows.add_argument("--relations", type=_names, metavar="A,B,…", help="facts: relations to forget (default: capital)")
    rows.add_argument("--data", help="folder or hub name of the rows (default: the published ones on the hub)")
    rows.add_argument("--split", help="tofu: forget01, forget05 or forget10; wmdp: bio or cyber")
    rows.add_argument("--authors", type=positive(int), help="tofu: retained authors to use (default: all)")
    rows.add_argument(
        "--model",
        help="folder or hub name of the model before unlearning (default: tofu trains one from scratch, facts takes SmolLM2)",
    )
    rows.add_argument("--retain-model", help="the same of a model that was never trained on the rows to forget")
    rows.add_argument(
        "--base",
        help="tofu: a model that is trained on the rows first, in place of one from scratch; smollm2, gemma3: from packages",
    )
    rows.add_argument("--facts", type=positive(int), help="facts: how many to forget (default: 24)")
    rows.add_argument("--trained", type=positive(int), help="facts: wordings of each fact that unlearning sees (default: 1)")
    rows.add_argument("--reworded", type=positive(int), help="facts: further wordings of each row to forget (default: none)")
    rows.add_argument(
        "--neighbours", type=positive(int), help="facts: further rows to retain, which the model writes itself (default: none)"
    )
    rows.add_argument("--pieces", type=count, help="muse, wmdp: pieces of text to train on, to forget and to retain")
    rows.add_argument(
        "--target-epochs",
        type=positive(float),
        help="people, tofu: passes of the models that are trained first, from scratch or from --base",
    )
    return parser


# Option → argument of the task's function, by task. Others make no sense there.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "people": {"people": "people", "target_epochs": "target_epochs", "epochs": "epochs", "cache": "cache"},
    "facts": {
        **{name: name for name in ("model", "relations", "trained", "reworded", "neighbours", "epochs", "cache")},
        "facts": "forget",
    },
    "tofu": {
        **{
            name: name
            for name in ("data", "split", "authors", "model", "retain_model", "base", "target_epochs", "epochs", "cache")
        },
    },
    "muse": {"data": "data", "model": "model", "retain_model": "retain_model", "pieces": "pieces_of_text", "epochs": "epochs"},
    "wmdp": {"data": "data", "split": "domain", "model": "model", "pieces": "pieces_of_text", "epochs": "epochs"},
}
_OF_TASKS = sorted({option for of_task in _ARGUMENTS.values() for option in of_task})


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the task's function, for JSON.

    Raises:
        EUAError: for an option that the task does not have, and without a model that it needs.
    """
    known = _ARGUMENTS[arguments.task]
    given = {option: getattr(arguments, option) for option in _OF_TASKS if getattr(arguments, option) is not None}
    for option in given.keys() - known.keys() - {"cache"}:
        of = [task for task, of_task in _ARGUMENTS.items() if option in of_task]
        raise EUAError(
            f"--{option.replace('_', '-')} was given for {arguments.task}, which has no use for it; it is an option of "
            f"{' and '.join(of)}: leave it out."
        )
    if arguments.task in ("muse", "wmdp") and arguments.model is None:
        raise EUAError(
            f"{arguments.task} was asked for without --model, but its rows say nothing to a small model trained from scratch: "
            "name the folder or hub name of a model that knows them."
        )
    if arguments.task == "tofu" and arguments.retain_model is not None and arguments.model is None:
        raise EUAError(
            "--retain-model was given without --model, but the two are compared token by token, so they have one tokenizer: "
            "give both, or neither."
        )
    values = {name: given[option] for option, name in known.items() if option in given}
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def _bench(settings: dict[str, Any], output: Path, storage: str | None) -> Any:
    from eua.bench.results import Bench

    options = dict(settings["options"])
    if "cache" in options:
        options["cache"] = Path(options["cache"])
    task = settings["task"]
    make_task: Callable[[int], Any] = partial(_maker(task), **options)
    return Bench(task, make_task, storage=storage, output=output, **{name: settings[name] for name in _COMPARED})


def _maker(task: str) -> Callable[..., Any]:
    from eua.bench import known, muse, people, tofu, wmdp

    makers: dict[str, Callable[..., Any]] = {
        "people": people.people,
        "facts": known.facts,
        "tofu": tofu.tofu,
        "muse": muse.muse,
        "wmdp": wmdp.wmdp,
    }
    return makers[task]


def _results(output: Path, storage: str | None) -> dict[str, Any]:
    from eua.bench.results import TUNING_SEED, results_of

    settings = _settings(output)
    try:
        bench = _bench(settings, output, storage)
    except (TypeError, KeyError) as error:
        raise _unreadable(output, error) from error
    return results_of(bench, bench.make_task(TUNING_SEED))


def _settings(output: Path) -> dict[str, Any]:
    """What the command was asked for when it wrote into a folder.

    Raises:
        EUAError: if that cannot be read.
    """
    try:
        settings = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(output, error) from error
    if not isinstance(settings, dict):
        raise _unreadable(output, ValueError(f"it holds a {type(settings).__name__}"))
    return settings


def _unreadable(output: Path, error: Exception) -> EUAError:
    return EUAError(
        f"{output / SETTINGS}, which says what a benchmark compares, cannot be read ({error}): name the output folder of a "
        "benchmark."
    )


def _write_files(results: dict[str, Any], output: Path) -> list[Any]:
    """Write the results in all three forms, and return the tables."""
    from eua.bench.page import write_page
    from eua.bench.table import markdown, tables
    from eua.files import replacing, write_json

    write_json(output / RESULTS, results)
    made = tables(results)
    with replacing(output / TABLE) as temporary:
        temporary.write_text(markdown(made), encoding="utf-8")
    write_page(output / PAGE, results)
    return made


def _write(results: dict[str, Any], output: Path) -> None:
    from eua.bench.table import markdown

    print(f"\n{markdown(_write_files(results, output)[:1])}")
    if not results["complete"]:
        print("Trials are left: run the same command again to go on.")
    print(f"Written: {output / RESULTS}, {output / TABLE}, {output / PAGE}")

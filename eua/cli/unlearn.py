"""``eua unlearn``: trains in one process or, under ``accelerate launch``, in several; resumes and saves.

The options are the fields of EUAConfig, by name, and a few more for the model, the rows and the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from accelerate import PartialState
from peft import LoraConfig

from eua.cli.options import Parser, add_model
from eua.data.sources import Row
from eua.distributed import end_process_group
from eua.errors import EUAError, did_you_mean, in_one_line
from eua.files import check_output_folder, locked, write_json, write_jsonl
from eua.model.loading import load_model
from eua.model.neighbours import checked_rows, write_neighbours
from eua.training.checkpoints import last_checkpoint
from eua.training.config import EUAConfig
from eua.training.settings_file import Setting, all_settings, describe, fits, parse_value, read_settings
from eua.training.trainer import EUATrainer

SETTINGS_FILE = "settings.json"
OWN, OWN_ROWS = "self", "retain.jsonl"  # the --retain that lets the model write the rows, and the file that they are kept in
OWN_NUMBERS: dict[str, Any] = {"count": 256, "neutral": 0.25, "surest": 0.5}
# Defaults that differ from EUAConfig's. Those are from TrainingArguments: save every 500 steps, and keep all checkpoints.
DEFAULTS: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1}
# Fields of TrainingArguments that --help shows; --help-all shows every one.
COMMON = (
    *("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "activation_checkpointing", "seed", "logging_steps"),
    *("eval_strategy", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("train_sampling_strategy", "report_to"),
)
# Fields of TrainingArguments that mean nothing here: --output and --resume take the place of the first two.
NOT_OPTIONS = ("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict")
MAY_CHANGE_ON_RESUME = ("resume", "overwrite", "output", "config", "save_steps", "save_strategy", "save_total_limit")


def main(argv: Sequence[str]) -> None:
    show_all = "--help-all" in argv
    parser, settings = _parser(show_all)
    path = _config_path(argv)
    if path is not None:
        _apply(path, parser, settings)
    arguments = parser.parse_args(["--help"] if show_all else argv)
    run_unlearn(arguments, {name: getattr(arguments, name) for name in settings if hasattr(arguments, name)})


def _parser(show_all: bool) -> tuple[Parser, dict[str, Setting]]:
    parser = Parser(
        "unlearn",
        "Energy-based unlearning alignment (D²): forgotten tokens rise above one energy boundary, and retained ones stay below "
        "another. --method chooses another method. ROWS is a JSONL, JSON, CSV or Parquet file, or a data set on the Hub "
        "(locuslab/TOFU:forget10:train).",
        (
            "eua unlearn --model MODEL --forget forget.jsonl --retain retain.jsonl --output unlearned --learning-rate 2e-4",
            "eua unlearn --config run.yaml --resume",
        ),
        usage="eua unlearn --model MODEL --forget ROWS --retain ROWS --output FOLDER [OPTIONS]",
    )
    add_model(parser)
    parser.add_argument("--forget", required=True, metavar="ROWS", help="rows to forget")
    parser.add_argument(
        "--retain",
        required=True,
        metavar="ROWS",
        help="rows to keep; cover as much as possible of what must stay. self: the model writes 256 rows itself, as `eua "
        "neighbours` does",
    )
    parser.add_argument("--eval-forget", metavar="ROWS", help="held-out forget rows, measured every epoch")
    parser.add_argument("--eval-retain", metavar="ROWS", help="held-out retain rows, measured every epoch")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the unlearned model, and for checkpoints inside it",
    )
    parser.add_argument(
        "--lora-rank", type=int, default=0, metavar="N", help="train a LoRA adapter of this rank; 0 trains every weight"
    )
    parser.add_argument(
        "--config", type=Path, metavar="RUN.yaml", help="YAML file with these options by name; options on the command line win"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="start again in an output folder that is not empty")
    parser.add_argument("--help-all", action="store_true", help="show every field of transformers' TrainingArguments, too")
    groups = {
        True: parser.add_argument_group("the method (fields of EUAConfig)"),
        False: parser.add_argument_group("training (fields of transformers' TrainingArguments)"),
    }
    settings = {name: setting for name, setting in all_settings().items() if name not in NOT_OPTIONS}
    for setting in settings.values():
        _add_setting(groups[setting.is_ours], setting, show_all or setting.is_ours or setting.name in COMMON)
    return parser, settings


def _add_setting(group: Any, setting: Setting, is_shown: bool) -> None:
    def parse(text: str) -> Any:
        try:
            return parse_value(text, setting.kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    default = DEFAULTS.get(setting.name, setting.default)
    flag: dict[str, Any] = {"nargs": "?", "const": True} if setting.kind is bool else {}
    group.add_argument(
        f"--{setting.name.replace('_', '-')}",
        dest=setting.name,
        type=parse,
        default=argparse.SUPPRESS,  # so only given options are set, and defaults come from EUAConfig alone
        metavar=_metavar(setting.kind),
        help=f"{setting.help.replace('%', '%%')} (default: {getattr(default, 'value', default)})"
        if is_shown
        else argparse.SUPPRESS,
        **flag,
    )


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    return {bool: "BOOL", int: "N", int | None: "N", float: "X", float | None: "X"}.get(kind, "VALUE")


def _config_path(argv: Sequence[str]) -> Path | None:
    """The file that ``--config`` names. It is read before the other options, because it sets their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")  # the real parser reports a missing value
    path: Path | None = parser.parse_known_args(argv)[0].config
    return path


def _apply(path: Path, parser: Parser, settings: dict[str, Setting]) -> None:
    """Use the values in the file as the defaults of the options.

    Raises:
        EUAError: if no option has one of the names, or if a value has the wrong kind.
    """
    options = {action.dest: action for action in parser._actions if action.dest not in ("help", "help_all", "config")}
    for name, value in read_settings(path).items():
        option = options.get(name)
        if option is None:
            raise EUAError(
                f"{path} sets {name!r}, which is not an option of `{parser.prog}`{did_you_mean(name, options)} "
                "Correct it, or leave it out."
            )
        own_kind = bool if option.nargs == 0 else int if option.type is int else str
        kind = settings[name].kind if name in settings else own_kind
        if not fits(value, kind):
            raise EUAError(f"{path} sets {name!r} to {value!r}, but it takes {describe(kind)}: correct it, or leave it out.")
        option.default = Path(value) if option.type is Path else value
        option.required = False


def run_unlearn(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Run the parsed command. Only the first process reads and writes the output folder.

    Args:
        arguments: the parsed options.
        settings: the fields of EUAConfig that were given.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # accelerate is not ready yet
    checkpoints = arguments.output / "checkpoints"
    identity = {
        key: str(value)
        for key, value in sorted(vars(arguments).items())
        if key not in MAY_CHANGE_ON_RESUME and not key.endswith("_token")  # tokens are secrets
    }
    _check_options(arguments)

    def check_output(folder: Path) -> None:
        check_output_folder(folder, allowed=arguments.resume or arguments.overwrite, how="--resume or --overwrite")
        if arguments.resume:
            _check_same_run(checkpoints, folder, identity)

    if is_first:
        # If another run is at work there, this one ends before a model is loaded.
        with locked(arguments.output) if os.path.isdir(arguments.output) else nullcontext():
            check_output(arguments.output)
    config = _config(arguments, settings, checkpoints)
    retain = _rows_to_retain(arguments, checkpoints)
    trainer = _trainer(arguments, config, retain)
    with locked(arguments.output) if is_first else nullcontext():
        if is_first:
            check_output(checkpoints)  # another run may have come first since
            if not arguments.resume:
                shutil.rmtree(checkpoints, ignore_errors=True)  # a later run must not resume an earlier one
            write_json(checkpoints / SETTINGS_FILE, identity)
            if not isinstance(retain, str):
                write_jsonl(checkpoints / OWN_ROWS, retain)
        PartialState().wait_for_everyone()
        checkpoint = last_checkpoint(checkpoints) if arguments.resume else None
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(arguments.output))
    del trainer  # it holds the process group
    end_process_group()
    if is_first:
        print(
            f"The unlearned model is in {arguments.output}. Next: "
            f"eua calibrate --model {arguments.output} --prompts HELD_OUT.jsonl"
        )


def _rows_to_retain(arguments: argparse.Namespace, checkpoints: Path) -> str | list[Row]:
    """What ``--retain`` names, or rows that the model writes itself. A resumed run has those that it began with.

    Raises:
        EUAError: if the rows to forget are no questions with answers, or if the model writes too few.
    """
    kept = checkpoints / OWN_ROWS
    if arguments.retain != OWN or (arguments.resume and kept.is_file()):
        return str(kept) if arguments.retain == OWN else arguments.retain
    rows = checked_rows(arguments.forget, **OWN_NUMBERS)
    model, tokenizer = load_model(arguments.model)
    return write_neighbours(model, tokenizer, rows, **OWN_NUMBERS, progress="rows to retain, by the model itself")


def _config(arguments: argparse.Namespace, settings: dict[str, Any], checkpoints: Path) -> EUAConfig:
    chosen = DEFAULTS | {"eval_strategy": "no" if arguments.eval_forget is None else "epoch"}
    for strategy in ("eval_strategy", "save_strategy"):
        if f"{strategy.partition('_')[0]}_steps" in settings and chosen[strategy] != "no":
            chosen[strategy] = "steps"
    with _settings_explained():
        return EUAConfig(output_dir=str(checkpoints), **chosen | settings)


def _trainer(arguments: argparse.Namespace, config: EUAConfig, retain: str | list[Row]) -> EUATrainer:
    rank = arguments.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    with _settings_explained():
        return EUATrainer(
            arguments.model,
            config,
            forget_dataset=arguments.forget,
            retain_dataset=retain,
            eval_forget_dataset=arguments.eval_forget,
            eval_retain_dataset=arguments.eval_retain,
            ref_model=arguments.model if config.needs_model_before else None,
            peft_config=lora,
        )


@contextmanager
def _settings_explained() -> Iterator[None]:
    """Turns what transformers and its libraries raise for settings into one line."""
    try:
        yield
    except EUAError:
        raise
    except (ValueError, TypeError, ImportError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise EUAError(
            f"These settings cannot be used: {in_one_line(error)}. Correct them; `eua unlearn --help-all` lists all."
        ) from error


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise for options that contradict each other, in the words of the command line."""
    if (arguments.eval_forget is None) != (arguments.eval_retain is None):
        given, missing = ("--eval-retain", "--eval-forget")[:: 1 if arguments.eval_forget is None else -1]
        raise EUAError(f"{given} was given without {missing}, but evaluation compares the two: give both, or neither.")
    if getattr(arguments, "load_best_model_at_end", False) and arguments.eval_forget is None:
        raise EUAError(
            "--load-best-model-at-end needs rows to compare models on: give --eval-forget and --eval-retain, or leave it out."
        )
    model, output = Path(arguments.model).resolve(), arguments.output.resolve()
    if model.is_dir() and (model == output or output / "checkpoints" in model.parents):
        raise EUAError(
            f"--output {arguments.output} would replace or delete the model before unlearning, {arguments.model}, which a "
            "comparison and a further run need: name another folder."
        )
    if arguments.retain == OWN and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EUAError(
            "--retain self was given in a run of several processes, each of which would write other rows: write them with `eua "
            "neighbours` first, and name their file."
        )
    if arguments.retain == OWN and os.path.exists(OWN):
        raise EUAError(
            f"--retain {OWN} means rows that the model writes itself, but there is also a file of this name here: pass ./{OWN} "
            "if you mean the file, or rename it."
        )
    if arguments.lora_rank and getattr(arguments, "distinct_directions", 0):
        raise EUAError(
            f"--lora-rank {arguments.lora_rank} was given with --distinct-directions {arguments.distinct_directions}, which "
            "makes an adapter of its own: leave one of them out."
        )
    if arguments.lora_rank < 0:
        raise EUAError(
            f"--lora-rank is {arguments.lora_rank}, but a rank is above 0, and 0 trains every weight: give one of these."
        )


def _check_same_run(checkpoints: Path, output: Path, identity: dict[str, str]) -> None:
    """Raise if ``--resume`` would continue another run, or if it finds files that no run wrote."""
    path = checkpoints / SETTINGS_FILE
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise EUAError(
                f"{output} contains files but no interrupted run to resume: name another folder, or pass --overwrite."
            )
        return  # it was interrupted before the first step: start
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EUAError(
            f"{path}, which holds the settings of the run to resume, cannot be read ({in_one_line(error)}): put it back, or "
            "start again with --overwrite."
        ) from error
    keys = [key for key in {**identity, **earlier} if earlier.get(key) != identity.get(key)]
    changed = [f"--{key.replace('_', '-')} {earlier.get(key, '(default)')} → {identity.get(key, '(default)')}" for key in keys]
    if changed:
        raise EUAError(
            f"The run to resume in {checkpoints} had other settings ({', '.join(changed)}), so the result would belong to "
            "neither run: repeat the command with the same settings, or start again with --overwrite."
        )

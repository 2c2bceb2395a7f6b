"""The parser of all commands, and the options that several commands share."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from eua.errors import EUAError, did_you_mean


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows only useful defaults, and keeps the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_stated = not action.help or "(default:" in action.help or action.default in (None, False, argparse.SUPPRESS)
        return action.help if is_stated or action.default == [] else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A command's parser: it raises :class:`EUAError` where argparse would exit, and suggests names for unknown options.

    Args:
        command: its name.
        description: what it does, in one or two sentences.
        examples: complete command lines.
        usage: the first line of the help, if argparse's would be too long.
    """

    def __init__(self, command: str, description: str, examples: Sequence[str], usage: str | None = None) -> None:
        super().__init__(
            prog=f"eua {command}",
            usage=usage,
            description="\n".join(textwrap.wrap(description, 110)),
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse knows no exponents

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise EUAError(
                f"{name} is not an option of `{self.prog}`{did_you_mean(name, self._option_string_actions)} "
                f"`{self.prog} --help` lists them."
            )
        return arguments

    def error(self, message: str) -> NoReturn:
        raise EUAError(f"{message}. `{self.prog} --help` explains the options.")


def count(text: str) -> int:
    """A converter to whole numbers from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def words(text: str) -> str:
    """A converter to texts that are not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} has no words")
    return text


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """A converter to finite numbers above 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            what = "whole number" if kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} above 0")
        return value

    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of the causal language model")


def add_guard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guard", help="folder or hub name of the guard (default: the model's)")


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that measure a model: sets of rows, the model before unlearning, a guard."""
    parser.add_argument("--forget", required=True, help="rows that the model has forgotten")
    parser.add_argument("--retain", required=True, help="rows that the model has kept")
    for name, kind in (("--also", "rows to keep"), ("--also-forget", "forgotten rows, e.g. in other words")):
        what = f"a further set of {kind}; may be repeated"
        parser.add_argument(name, action="append", default=[], metavar="NAME=ROWS", type=_named_source, help=what)
    parser.add_argument("--before", help="the model before unlearning, for comparison")
    add_guard(parser)
    parser.add_argument("--batch-size", type=positive(int), default=32, help="rows in a forward pass")


def _named_source(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not (name and separator and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ROWS")
    return name, source


def read_sets(arguments: argparse.Namespace) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Read the sets of :func:`add_sets`: the rows of each set by name, and the names of the forgotten sets."""
    from eua.data.rows import check_rows
    from eua.data.sources import read_rows

    sources = {"forget": arguments.forget, "retain": arguments.retain}
    for name, source in arguments.also + arguments.also_forget:
        if name in sources:
            raise EUAError(f"--also {name}={source} gives this name to a second set: choose another name.")
        sources[name] = source
    forgotten = ("forget", *(name for name, _ in arguments.also_forget))
    sets = {name: read_rows(source, f"{name} set") for name, source in sources.items()}
    for name, rows in sets.items():
        check_rows(rows, f"{name} set", answers=True)
    return sets, forgotten

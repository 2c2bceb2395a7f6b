"""The entry point of ``eua``: finds the command, runs it, and turns errors into one line on stderr and an exit code.

A command's file is imported only when the command is called, so ``eua --help`` is fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from eua.errors import EUAError, did_you_mean, in_one_line

COMMANDS = {
    "demo": "watch a small model learn, forget and refuse (a few minutes on a laptop, no download)",
    "unlearn": "train a model to forget some rows and keep others",
    "reword": "add rows that ask for the facts to forget in other words",
    "neighbours": "let the model write rows to retain that lie near the rows to forget",
    "alternatives": "let the model write other answers to the rows to forget, for the method AltPO",
    "calibrate": "set the threshold above which prompts are refused",
    "ask": "ask a model, guard on",
    "serve": "serve a model over HTTP, guard on",
    "evaluate": "measure what a model still knows and what it refuses",
    "report": "write an HTML report of an unlearned model",
    "bench": "compare unlearning methods on one footing",
}
OVERVIEW = """\
usage: eua COMMAND [OPTIONS]

Make a language model forget what it must not know, and refuse when asked for it.

{commands}

Start with `eua demo`. `eua COMMAND --help` explains a command and shows examples; `eua --version` prints versions.
Rows are JSONL, JSON, CSV or Parquet files, or data sets on the Hugging Face Hub, with question/answer, prompt/completion or
messages."""

BAD_INPUT = 2
BROKEN_PIPE = 141  # as shells report a program ended by SIGPIPE
INTERRUPTED = 130  # the exit code that shells report for a program ended by SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``eua`` with ``argv`` (by default the process's arguments) and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, options = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        if name in ("-h", "--help"):
            width = max(map(len, COMMANDS))
            print(OVERVIEW.format(commands="\n".join(f"  {key.ljust(width)}  {text}" for key, text in COMMANDS.items())))
        elif name == "--version":
            print(f"eua {version('eua')} (torch {version('torch')}, transformers {version('transformers')})")
        elif name not in COMMANDS:
            raise EUAError(f"There is no command {name!r}{did_you_mean(name, COMMANDS)} `eua --help` lists the commands.")
        else:
            _check_text(options)
            import_module(f"eua.cli.{name}").main(options)
    except EUAError as error:
        line = " ".join(str(error).splitlines())  # names of files may have several
        print(f"eua {name}: {line}" if name in COMMANDS else f"eua: {line}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # nobody reads the output any more, as in `eua evaluate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return BROKEN_PIPE
    except OSError as error:  # of any path or connection; what can be said about it better is an EUAError by now
        print(f"eua {name}: {in_one_line(error)}. Check the paths that you passed, and the space on the disk.", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        hint = " Run the same command with --resume to continue." if name == "unlearn" else ""
        print(f"eua {name}: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_text(options: Sequence[str]) -> None:
    for text in options:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the shell has passed other bytes
            raise EUAError(
                f"{text!r} is not UTF-8, so it could not be written down: rename the file, or correct it."
            ) from error

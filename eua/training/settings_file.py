"""A run's settings from a YAML file: what it sets becomes the default of the command line's options."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eua.errors import EUAError
from eua.training.config import EUAConfig

# Fields of EUAConfig that the command line names otherwise.
OPTION_OF_FIELD = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "output_dir": "output",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for a text, since it has no point; everyone else takes it for a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def apply_run_file(path: Path, parser: argparse.ArgumentParser) -> None:
    """Take the settings in ``path`` as defaults of ``parser``; fields of EUAConfig without an option go into ``fields``.

    Raises:
        EUAError: no such file, no mapping in it, a key that nothing is called, one given twice, or a value of the wrong kind.
    """
    options = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    fields = {field.name for field in dataclasses.fields(EUAConfig) if field.init} - set(OPTION_OF_FIELD)
    given: dict[str, str] = {}
    others: dict[str, Any] = {}
    for key, value in _read(path).items():
        plain = str(key).replace("-", "_")
        name = OPTION_OF_FIELD.get(plain, plain)
        if name in given:
            raise EUAError(f"{path} sets {given[name]!r} and {key!r}, which are the same setting: leave one out.")
        given[name] = str(key)
        if name in options:
            options[name].default = _value_of(options[name], value, key, path)
            options[name].required = False
        elif name in fields:
            others[name] = value
        else:
            nearest = difflib.get_close_matches(plain, [*options, *fields, *OPTION_OF_FIELD], n=1, cutoff=0.0)[0]
            raise EUAError(
                f"{path} sets {key!r}, which is neither an option of `{parser.prog}` nor a field of EUAConfig: "
                f"did you mean {nearest!r}? Correct it, or leave it out."
            )
    parser.set_defaults(fields=others)


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise EUAError(f"The settings {path} cannot be read ({error}): name a YAML file with --config.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise EUAError(f"The settings {path} are not YAML ({reason}): write one `key: value` a line.") from error
    if not isinstance(content, Mapping):
        raise EUAError(f"The settings {path} hold {content!r}, not settings by name: write one `key: value` a line.")
    return content


def _value_of(option: argparse.Action, value: Any, key: Any, path: Path) -> Any:
    """A value from the file as the option would have it from the command line."""
    if option.nargs == 0:  # a switch
        kind, is_right = "true or false", isinstance(value, bool)
        converted = value
    else:
        convert: Any = option.type or str
        kind, is_right = f"a {convert.__name__.lower()}", isinstance(value, (str, int, float)) and not isinstance(value, bool)
        try:
            converted = convert(str(value))
        except ValueError:
            is_right = False
    if not is_right:
        raise EUAError(f"{path} sets {key!r} to {value!r}, but it takes {kind}: correct it, or leave it out for the default.")
    return converted

"""The fields of EUAConfig: their types, help texts and defaults, and how their values are read from text and YAML files.

The command line, the settings file and :class:`eua.EUAConfig` share these, so that a setting has one name everywhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments

from eua.errors import EUAError
from eua.training.config import EUAConfig


class Setting(NamedTuple):
    """A field of EUAConfig."""

    name: str
    kind: Any  # its type, or a union of types
    help: str
    default: Any
    is_ours: bool  # False: inherited from TrainingArguments


def all_settings() -> dict[str, Setting]:
    """Every field of EUAConfig by its name."""
    kinds = get_type_hints(EUAConfig)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {}
    for field in dataclasses.fields(EUAConfig):
        if field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = " ".join(field.metadata.get("help", "").split())
            found[field.name] = Setting(field.name, kinds[field.name], text, default, field.name not in inherited)
    return found


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, which YAML 1.1 takes for a text, and raises an error if a key occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str, kind: Any) -> Any:
    """A value of type ``kind`` from the text of a command-line option: YAML, unless it is a plain string.

    Raises:
        ValueError: the text is no such value.
    """
    if kind is str or _is_choice(kind):
        value: Any = text
    else:
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        if not fits(value, kind):
            value = text  # "10" where a text is wanted
    if not fits(value, kind):
        raise ValueError(f"{text!r} is not {describe(kind)}")
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value may stand in a field of type ``kind``; whole numbers may where fractions may."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str) and value in {member.value for member in kind}
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def describe(kind: Any) -> str:
    """The type in words, for errors."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    if get_origin(kind) in (Union, UnionType):
        parts = [describe(part) for part in get_args(kind)]
        return " or ".join(sorted(parts, key=lambda part: part == "null"))
    if _is_choice(kind):
        choices = get_args(kind) or [member.value for member in kind]
        return "one of " + ", ".join(map(str, choices))
    plain = get_origin(kind) or kind
    return names.get(plain, f"a {plain.__name__}")


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum))


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML file sets, by name with underscores; only that each name occurs once is checked.

    Raises:
        EUAError: no such file, no mapping in it, or a setting that is given twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise EUAError(f"The settings {path} cannot be read ({error}): name a YAML file with --config.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a number of too many digits, or too many brackets
        reason = " ".join(str(error).split())
        raise EUAError(f"The settings {path} are not YAML ({reason}): write one `key: value` a line.") from error
    if not isinstance(content, Mapping):
        raise EUAError(f"The settings {path} hold {content!r}, not settings by name: write one `key: value` a line.")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in settings:
            raise EUAError(f"{path} sets {name!r} twice, with a dash and with an underscore: leave one out.")
        settings[name] = value
    return settings

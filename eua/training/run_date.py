"""The moment at which a run began, for chat templates that write the date: a resumed run must train on the same tokens."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from eua.errors import EUAError
from eua.files import write_json

DATE_FILE = "run_date.json"


def run_date(resumed: Path | None = None) -> datetime:
    """When the run in the folder ``resumed`` began, or now if none is resumed; all processes call this, and get the same.

    Raises:
        EUAError: if the file cannot be read.
    """
    found: datetime | EUAError | None = None
    if PartialState().is_main_process:  # the file may be on its disk only
        try:
            found = (_read(resumed / DATE_FILE) if resumed else None) or datetime.now().replace(microsecond=0)
        except EUAError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, EUAError):
        raise found
    return found


def save_run_date(output_folder: Path, date: datetime) -> None:
    write_json(output_folder / DATE_FILE, {"began": date.isoformat()})


def _read(path: Path) -> datetime | None:
    if not path.is_file():
        return None
    try:
        return datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["began"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EUAError(
            f"{path}, which holds the date that the chat template writes in this run, cannot be read ({error!r}): put it back, "
            'or write {"began": "YYYY-MM-DDTHH:MM:SS"} into it, the moment at which the run began.'
        ) from error

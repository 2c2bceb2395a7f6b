"""A command that is killed, or that finds the disk full, at any moment leaves each output whole: the earlier one or the new."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from eua.cli.main import main
from eua.files import write_jsonl
from tests.conftest import tiny_llama

OF_FILES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
FORGET = ["--forget", "{place}/forget.jsonl", "--retain", "{place}/retain.jsonl"]
SWAPPED = ["--forget", "{place}/retain.jsonl", "--retain", "{place}/forget.jsonl"]
CALIBRATE = ["calibrate", "--prompts", "{place}/held_out.jsonl", "--output", "{output}"]
# The command that writes the earlier output, and the one that is broken off.
COMMANDS = {
    "calibrate": (CALIBRATE, [*CALIBRATE, "--tolerance", "0.1"]),
    "evaluate": (
        ["evaluate", *FORGET, "--output", "{output}"],
        ["evaluate", *SWAPPED, "--output", "{output}", "--overwrite"],
    ),
    "report": (
        ["report", *FORGET, "--rows", "2", "--output", "{output}/page.html"],
        ["report", *FORGET, "--rows", "3", "--output", "{output}/page.html", "--overwrite"],
    ),
}


@pytest.fixture(scope="module")
def place(tokenizer, rows, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    tiny_llama(len(tokenizer)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name in ("forget", "retain"):
        write_jsonl(place / f"{name}.jsonl", rows[name][:6])
    write_jsonl(place / "held_out.jsonl", rows["retain"][6:] + rows["calibration"])
    return place


class Watch:
    """Calls a function before each operation on files in a folder, in the block of :meth:`on`. Hooks cannot be removed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.call: Callable[[], None] | None = None
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self, folder: Path, call: Callable[[], None]) -> Iterator[None]:
        self.folder, self.call = folder, call
        try:
            yield
        finally:
            self.call = None

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.call is None or event not in OF_FILES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if str(self.folder) in os.path.abspath(arguments[0]):
            call, self.call = self.call, None  # what it does itself does not count
            try:
                call()
            finally:
                self.call = call


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder under the names that users know."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path.relative_to(folder))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def filled(argv: list[str], place: Path, output: Path) -> list[str]:
    return [argv[0], "--model", str(place / "model"), *(part.format(place=place, output=output) for part in argv[1:])]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_moment(name, place, watch, tmp_path):
    """A kill leaves the files as they are, so it is enough to look at them at each moment."""
    first, second = (filled(argv, place, tmp_path) for argv in COMMANDS[name])
    assert main(first) == 0
    old, seen = contents(tmp_path), []
    with watch.on(tmp_path, lambda: seen.append(contents(tmp_path))):
        assert main(second) == 0
    new = contents(tmp_path)
    assert len(seen) >= 3
    assert old.keys() == new.keys()
    assert all(old[file] != new[file] for file in old)
    for found in seen:
        assert found.keys() == old.keys()
        assert all(content in (old[file], new[file]) for file, content in found.items())
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_at_any_moment(name, place, watch, tmp_path, capsys):
    first, second = (filled(argv, place, tmp_path) for argv in COMMANDS[name])
    assert main(first) == 0
    old = contents(tmp_path)
    failed = 0
    for moment in range(1, 100):
        count = 0

        def fill(moment: int = moment) -> None:
            nonlocal count
            count += 1
            if count == moment:
                raise OSError(28, "No space left on device")

        with watch.on(tmp_path, fill):
            code = main(second)
        error = capsys.readouterr().err
        if code:
            assert code == 2
            assert error.splitlines()[-1].startswith(f"eua {name}: ")
            assert "No space left on device" in error
            found = contents(tmp_path)
            assert found.keys() == old.keys()
            assert any(found[file] == old[file] for file in found)
            failed += 1
        if count < moment:
            break
        assert main([*first, *([] if name == "calibrate" else ["--overwrite"])]) == 0
        assert contents(tmp_path) == old
    assert failed >= 3


@pytest.fixture
def demo(trained_folder, tmp_path, monkeypatch) -> list[str]:
    """The demo's command, with so little training that it takes seconds."""
    monkeypatch.setattr("eua.demo.run.cached_target", lambda *arguments: trained_folder)
    monkeypatch.setattr("eua.demo.run.UNLEARNING", {"max_steps": 1, "learning_rate": 1e-3})
    places = ["--output", str(tmp_path / "demo"), "--cache", str(tmp_path / "cache")]
    return ["demo", *places, "--people", "100", "--overwrite"]


def assert_whole(found: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """What a demo that was broken off left: of each file the earlier or the new one, and no model with the guard of another."""
    # The files of a model are replaced one after the other, between the removal and the writing of its config.
    assert {file for file in old if file not in found} <= {file for file in old if file.startswith("unlearned/")}
    assert all(content in (old[file], new[file]) for file, content in found.items())
    if "unlearned/config.json" in found:
        model, guard = "unlearned/model.safetensors", "unlearned/energy_guard.json"
        assert (found[model], found[guard]) in [(of[model], of[guard]) for of in (old, new)]


def test_a_kill_of_the_demo_at_any_moment(demo, watch, tmp_path):
    output, seen = tmp_path / "demo", []
    assert main(demo) == 0
    old = contents(output)
    with watch.on(output, lambda: seen.append(contents(output))):
        assert main([*demo, "--seed", "1"]) == 0
    new = contents(output)
    assert old.keys() == new.keys()
    for found in seen:
        assert_whole(found, old, new)


def test_a_full_disk_in_the_demo(demo, watch, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main([*demo, "--seed", "1"]) == 0
    new, moments = contents(output), 0

    def fill(full_at: int | None = None) -> None:
        nonlocal moments
        moments += 1
        if moments == full_at:
            raise OSError(28, "No space left on device")

    with watch.on(output, fill):
        assert main(demo) == 0
    old, last = contents(output), moments
    failed = 0
    for full_at in range(2, last, last // 6):
        moments = 0
        with watch.on(output, partial(fill, full_at)):
            code = main([*demo, "--seed", "1"])
        error = capsys.readouterr().err
        assert_whole(contents(output), old, new)
        if code:  # not all of these operations need room
            assert code == 2
            assert error.splitlines()[-1].startswith("eua demo: ")
            assert "No space left on device" in error
            failed += 1
    assert failed >= 3

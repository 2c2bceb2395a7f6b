"""Tests that files and folders are written completely or not at all."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from eua import EUAError
from eua.files import check_output_file, check_output_folder, fill_folder, locked, replacing, write_json


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError, match="half"), replacing(tmp_path / "a.json") as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert "old" in (tmp_path / "a.json").read_text()
        raise RuntimeError("half")
    assert "old" in (tmp_path / "a.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_filled_with_its_config_last_and_nothing_stale(tmp_path, monkeypatch):
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "energy_guard.json",
        "boundaries.safetensors",
        "notes.txt",
    ):
        (tmp_path / name).write_text("old")
    moved = []

    def write(folder: Path) -> None:
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
            (folder / name).write_text("new")
        assert (tmp_path / "adapter_config.json").exists()

    replace = os.replace
    monkeypatch.setattr("eua.files.os.replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
    fill_folder(tmp_path, write)
    assert moved[-1] == "config.json"
    assert (tmp_path / "boundaries.safetensors").exists()  # belongs to the training run, not to the model
    (tmp_path / "boundaries.safetensors").unlink()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors", "notes.txt"}


def test_a_failed_fill_leaves_the_old_folder(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(EUAError, match="cannot be written .*disk full.*: free some space") as raised:
        fill_folder(tmp_path, write)
    assert isinstance(raised.value.__cause__, OSError)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "old")]


def test_errors_of_the_caller_are_not_taken_for_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.json"):
        raise ZeroDivisionError


@contextmanager
def locked_elsewhere(folder: Path):
    """Another process holds the lock of ``folder`` and is then killed."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(into, b"1")
            time.sleep(60)
        os._exit(0)
    os.close(into)
    try:
        assert os.read(out, 1) == b"1"
        yield
    finally:
        os.close(out)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_is_locked_until_its_process_ends_in_whatever_way(tmp_path):
    with locked_elsewhere(tmp_path):
        with pytest.raises(EUAError, match="Another process is writing into .* wait for it to end"), locked(tmp_path):
            pass
        with pytest.raises(EUAError, match="Another process is writing into"):
            fill_folder(tmp_path, lambda folder: None)
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path):
    """As the persistent workers of a data loader: they have a copy of every open file."""
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_thread_may_lock_a_folder_again_and_another_may_not(tmp_path):
    refused = []

    def other() -> None:
        with pytest.raises(EUAError, match="is writing into"), locked(tmp_path):
            pass
        refused.append(True)

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused
    with locked(tmp_path):
        pass


def test_where_folders_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert "cannot be locked" in caplog.text
    assert "let no other process write into it" in caplog.text


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_not_disturbed(tmp_path):
    left, running, other = (tmp_path / name for name in (".a.json.1.partial", ".a.json.2.partial", ".b.json.1.partial"))
    for path in (left, running, other):
        path.touch()
    for path in (left, other):
        os.utime(path, (0, 0))
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", running.name, other.name}


def test_an_output_that_cannot_be_written_is_found_without_a_trace(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    for check in (check_output_file, check_output_folder):
        with pytest.raises(EUAError, match="rows.jsonl is not a folder: name another path"):
            check(rows / "deep" / "out", allowed=True, how="")
        with pytest.raises(EUAError, match="cannot be written .*: free some space, or name a place"):
            check(tmp_path / ("n" * 300), allowed=True, how="")
        check(tmp_path / "new" / "out", allowed=True, how="")
    with pytest.raises(EUAError, match="cannot be written"):  # its temporary name is too long
        check_output_file(tmp_path / ("n" * 250), allowed=True, how="")
    with pytest.raises(EUAError, match="is a file that this command reads, and would be lost: name another"):
        check_output_file(rows, allowed=True, how="", inputs=["org/name", str(tmp_path / "." / "rows.jsonl")])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_output_folder_without_permission_is_found(tmp_path, monkeypatch):
    def touch(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", touch)  # a superuser may write anywhere
    with pytest.raises(EUAError, match="cannot be written .*Permission denied"):
        check_output_folder(tmp_path, allowed=True, how="")

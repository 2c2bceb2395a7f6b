"""Tests that files and folders are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from eua.files import fill_folder, replacing, write_json


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

    import os

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

    with pytest.raises(OSError, match="disk full"):
        fill_folder(tmp_path, write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "old")]

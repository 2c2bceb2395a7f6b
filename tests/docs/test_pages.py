"""The pages of the documentation: their code runs as printed, the commands on them exist, and their links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REPOSITORY = "https://github.com/eua-unlearning/eua/blob/main/"
IMAGES = "https://raw.githubusercontent.com/eua-unlearning/eua/main/"
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    language: str
    caption: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        language, text, caption = match["language"].strip(), match["text"], None
        if language.startswith("{code-block}"):
            language = language.split()[-1]
            caption = re.search(r"^:caption: (.*)$", text, re.MULTILINE)
            text = re.sub(r"^:.*\n", "", text, flags=re.MULTILINE)
        found.append(Block(language, caption[1] if caption else None, text))
    return found


def commands(text: str) -> list[list[str]]:
    """The calls of ``eua`` among the lines of a shell block, as argument lists without the program's name."""
    found = []
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        words = words[3:] if words[:3] == ["accelerate", "launch", "-m"] else words
        if words[:1] == ["eua"]:
            found.append(words[1:])
    return found


def run_eua(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["eua", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("eua", run_name="__main__")
    return end.value.code or 0


@pytest.fixture
def own_files(
    tmp_path: Path, trained_folder: Path, rows: dict[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[dict[str, str]]]:
    """A working directory with the model and the files that the examples name; file name → rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_folder, "my-model")
    files = {
        "forget.jsonl": rows["forget"],
        "retain.jsonl": rows["retain"],
        "held_out.jsonl": rows["calibration"] + rows["test"],
    }
    for name, content in files.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return files


def run_page(page: Path, files: dict[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page from top to bottom: rows are added to their files, Python is executed, shell commands are called."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "json" and block.caption is not None:
            assert block.caption in files
            assert [json.loads(line) for line in block.text.strip().split("\n")]
            with Path(block.caption).open("a", encoding="utf-8") as file:
                file.write(block.text.strip() + "\n")
        elif block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        elif block.language == "sh":
            for arguments in commands(block.text):
                assert run_eua(arguments, monkeypatch) == 0, arguments
    return names


def test_the_quick_start_runs_as_printed(own_files, monkeypatch, capsys):
    names = run_page(ROOT / "docs" / "quick_start.md", own_files, monkeypatch)
    rows = len(own_files["forget.jsonl"]) + 2
    assert names["report"]["sets"]["forget"]["rows"] == rows
    assert (
        names["report"]["sets"]["forget"]["extraction_strength"] < 0.5
    )  # of 8 rows that the model knew, and 2 that it did not
    assert names["guard"].calibration_prompts == len(own_files["held_out.jsonl"]) + 2
    for folder in ("unlearned", "unlearned-cli"):
        assert {"config.json", "energy_guard.json", "README.md"} <= {path.name for path in Path(folder).iterdir()}
    assert Path("report.html").is_file()
    assert "→" in capsys.readouterr().out


def test_the_readme_runs_as_printed(own_files, monkeypatch, capsys):
    names = run_page(ROOT / "README.md", own_files, monkeypatch)
    assert names["handle"].refused.shape == (1,)
    assert Path("unlearned", "energy_guard.json").is_file()
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_every_page_is_python(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)


def options_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    assert run_eua([command, "--help-all" if command == "unlearn" else "--help"], monkeypatch) == 0
    return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)) | {"--help"}


def test_commands_on_every_page_have_options_that_exist(monkeypatch, capsys):
    known: dict[str, set[str]] = {}
    seen = []
    for page in PAGES:
        for block in blocks(page):
            for command, *arguments in commands(block.text) if block.language in ("", "sh") else []:
                if command == "COMMAND":
                    continue
                known.setdefault(command, options_of(command, monkeypatch, capsys))
                options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
                assert options <= known[command], f"{page.name}: eua {command}"
                seen.append(command)
            if block.language == "yaml":
                known.setdefault("unlearn", options_of("unlearn", monkeypatch, capsys))
                options = {f"--{key.replace('_', '-')}" for key in yaml.safe_load(block.text)}
                assert options <= known["unlearn"], page.name
                seen.append("unlearn --config")
    assert {"unlearn", "unlearn --config", "calibrate", "ask", "evaluate", "report", "serve", "demo"} <= set(seen)


def test_the_readme_has_no_relative_link():
    """It is shown on a package index, too, where there are no other files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = LINK.findall(text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    for line in re.findall(r"^!\[.*$", text, re.MULTILINE):
        assert f"]({IMAGES}" in line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_to_files(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        for base in (REPOSITORY, IMAGES):
            if link.startswith(base):
                assert (ROOT / link.removeprefix(base)).is_file(), link
        if not link.startswith(("https://", "#")):
            assert (page.parent / link.partition("#")[0]).is_file(), link


def test_the_commands_for_tofu_make_what_the_example_reads():
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8").replace("\\\n", " ")
    before, command, after = page.partition("\neua unlearn --config examples/tofu_forget10.yaml\n")
    assert command
    settings = yaml.safe_load((ROOT / "examples" / "tofu_forget10.yaml").read_text(encoding="utf-8"))
    for path in (settings["retain"], settings["eval-retain"]):
        assert f" > {path} " in before
    assert f"train_target.py --rows tofu/full.jsonl --output {settings['model']} " in before
    assert f"eua calibrate --model {settings['output']} " in after


def test_the_benchmarks_tables_and_pictures_are_those_of_its_results():
    made = runpy.run_path(str(ROOT / "docs" / "bench_tables.py"))
    shown = {page: page.read_text(encoding="utf-8") for page in made["PAGES"]}
    assert sum(text.count("<!-- bench ") for text in shown.values()) >= 4
    for page, text in shown.items():
        assert text.count("<!-- bench ") == text.count("<!-- end -->"), page
    written = made["written"]()
    assert {path.suffix for path in written} == {".md", ".svg"}
    for path, content in written.items():
        assert path.read_text(encoding="utf-8") == content, f"run python docs/bench_tables.py: {path} differs"


def test_a_table_that_no_results_have_is_an_error():
    made = runpy.run_path(str(ROOT / "docs" / "bench_tables.py"))
    with pytest.raises(ValueError, match="has no column fame, but"):
        made["filled"]("<!-- bench people.json | Tuning | fame -->\n<!-- end -->")
    with pytest.raises(ValueError, match="has no table 'Fame', but"):
        made["filled"]("<!-- bench people.json | Fame | fame -->\n<!-- end -->")

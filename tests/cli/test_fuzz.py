"""Whatever is in an option or a file: a command works, or ends in one line and exit code 2, never in a traceback."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eua.cli.main import COMMANDS, main
from eua.cli.options import Parser
from eua.errors import EUAError
from eua.files import write_jsonl
from eua.guard.guard import EnergyGuard
from tests.conftest import tiny_llama

FEW = settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXTS = [
    *("", " ", "-1", "0", "1", "2", "1e999", "nan", "-inf", "9" * 5000, "0x1", "1e-400", "٣", "null", "true", "no"),
    *("[]", "{}", "[1", "{a: 1}", "{a: 1, a: 2}", "[" * 20_000, "&a [*a]", "? [1]", "1: 2", "2026-01-01", "a=b", "="),
    *("org/name", "none.json", "a/../b", "~nobody/x", "\n", "\ud800", "ü", "n" * 300, "!!python/name:os.system"),
    *("{file}", "{file}/x", "{folder}", "{rows}", "{model}"),
]
CONTENTS = [
    *(b"", b"\0" * 8, b"\xff\xfe", b"\xff" * 64, b"null", b"3", b"1" * 5000, b'"text"', b"[]", b"{}", b"[1]", b'{"a": 1}'),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"&a [*a]", b"a: 1\na: 2"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
]


@pytest.fixture(scope="module")
def place(tokenizer, rows, tmp_path_factory) -> Path:
    """A model with a guard, a run that was interrupted, rows, and an ordinary file and folder."""
    place = tmp_path_factory.mktemp("fuzz")
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    EnergyGuard.calibrate(model, tokenizer, rows["retain"]).save_pretrained(place / "model")
    for name in ("forget", "retain"):
        write_jsonl(place / f"{name}.jsonl", rows[name][:6])
    write_jsonl(place / "keyed.jsonl", [row | {"keys": [row["answer"].strip(".")]} for row in rows["forget"][:2]])
    write_jsonl(place / "held_out.jsonl", rows["retain"][6:] + rows["calibration"])
    (place / "run.yaml").write_text("max-steps: 1\nlearning-rate: 1e-3\n")
    assert main(command("unlearn", place, place / "run", "--save-strategy", "steps", "--save-steps", "1")) == 0
    (place / "file").write_text("text")
    (place / "folder").mkdir()
    return place


def command(name: str, place: Path, output: Path, *more: str) -> list[str]:
    sets = ["--forget", str(place / "forget.jsonl"), "--retain", str(place / "retain.jsonl")]
    given = {
        "demo": ["--output", str(output), "--cache", str(output / "cache")],
        "unlearn": [*sets, "--output", str(output), "--config", str(place / "run.yaml")],
        "alternatives": [
            "--forget",
            str(place / "forget.jsonl"),
            "--output",
            str(output / "rows.jsonl"),
            "--max-new-tokens",
            "1",
        ],
        "reword": ["--forget", str(place / "keyed.jsonl"), "--output", str(output / "rows.jsonl"), "--max-new-tokens", "1"],
        "neighbours": ["--forget", str(place / "forget.jsonl"), "--output", str(output / "rows.jsonl"), "--count", "1"],
        "bench": ["people", "--people", "20", "--output", str(output), "--cache", str(output / "cache"), "--workers", "1"],
        "calibrate": ["--prompts", str(place / "held_out.jsonl"), "--output", str(output)],
        "ask": ["Who?", "--max-new-tokens", "1"],
        "serve": ["--port", "0"],
        "evaluate": [*sets, "--output", str(output)],
        "report": [*sets, "--output", str(output), "--rows", "2"],
    }
    return [name, *([] if name in ("demo", "bench") else ["--model", str(place / "model")]), *given[name], *more]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No network, no server that runs, no model of the demo's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("eua.serving.server.DrainingServer.run", lambda *arguments, **options: None)
    monkeypatch.setattr("eua.demo.target.train_target", stop)
    monkeypatch.chdir(tmp_path)


def stop(*arguments, **options):
    raise EUAError("no further")


def options_of(name: str) -> list[str]:
    """The options of a command that take a value."""
    found = []

    class Listing(Parser):
        def parse_args(self, *arguments, **more):
            found.extend(
                action.option_strings[-1]
                for action in self._actions
                if action.option_strings and (action.nargs is None or action.nargs == "?")
            )
            raise EUAError("listed")

    module = import_module(f"eua.cli.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Parser", Listing)
        with pytest.raises(EUAError, match="listed"):
            module.main([])
    return found


def run(argv: list[str], capsys) -> str:
    """Run a command; return what it wrote to stderr last."""
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code in (0, 2), (argv, error)
    if code:
        assert error.splitlines()[-1].startswith("eua"), (argv, error)
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name, place, quick, tmp_path, capsys):
    options = options_of(name)

    @FEW
    @given(st.sampled_from(options), st.sampled_from(TEXTS))
    def check(option, text):
        filled = text.replace("{file}", str(place / "file")).replace("{folder}", str(place / "folder"))
        filled = filled.replace("{rows}", str(place / "retain.jsonl")).replace("{model}", str(place / "model"))
        output = tmp_path / "output"
        run(command(name, place, output, f"{option}={filled}"), capsys)
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)

    check()


FILES = {
    "ask": [
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/model.safetensors",
        "model/energy_guard.json",
    ],
    "unlearn": ["run.yaml", "forget.jsonl"],
    "calibrate": ["held_out.jsonl"],
}
OF_RUN = [
    "settings.json",
    "boundaries.safetensors",
    *(f"checkpoint-1/{name}" for name in ("files.json", "model.safetensors", "optimizer.pt", "trainer_state.json")),
]


def changed(draw_from: st.DataObject, content: bytes) -> bytes:
    how = draw_from.draw(st.sampled_from(("other", "cut", "byte")))
    if how == "other":
        return draw_from.draw(st.sampled_from(CONTENTS))
    at = draw_from.draw(st.integers(0, max(0, len(content) - 1)))
    return content[:at] + (b"" if how == "cut" else bytes([draw_from.draw(st.integers(0, 255))]) + content[at + 1 :])


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_files(name, file, place, quick, tmp_path, capsys):
    path = place / file
    good = path.read_bytes()

    @settings(FEW, max_examples=15)
    @given(st.data())
    def check(data):
        path.write_bytes(changed(data, good))
        try:
            run(command(name, place, tmp_path / "output"), capsys)
        finally:
            path.write_bytes(good)
            shutil.rmtree(tmp_path / "output", ignore_errors=True)

    check()


@pytest.mark.parametrize("file", OF_RUN)
def test_files_of_a_run(file, place, quick, tmp_path, capsys):
    @settings(FEW, max_examples=8)
    @given(st.data())
    def check(data):
        output = tmp_path / "run"
        shutil.copytree(place / "run", output)
        path = output / "checkpoints" / file
        path.write_bytes(changed(data, path.read_bytes()))
        run(command("unlearn", place, output, "--save-strategy", "steps", "--save-steps", "1", "--resume"), capsys)
        shutil.rmtree(output)

    check()

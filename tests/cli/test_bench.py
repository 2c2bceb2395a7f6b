"""``eua bench``: what it refuses, what it writes, and that the same command goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eua.cli.main import BAD_INPUT, main
from tests.bench.conftest import SIZE, made_up_trial


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["people", "--methods", "eua,simnpp"], "There is no method 'simnpp': did you mean 'simnpo'"),
        (["people", "--methods", "eua, npo, eua"], "The method eua was named 2 times"),
        (
            ["people", "--data", "rows"],
            "--data was given for people, which has no use for it; it is an option of tofu and muse",
        ),
        (["muse"], "muse was asked for without --model"),
        (["wmdp", "--trials", "0"], "'0' is not a whole number above 0"),
        (["tofu", "--retain-model", "x"], "--retain-model was given without --model"),
        (["peeple"], "invalid choice: 'peeple'"),
        (["people", "--people", "10"], "people = 10, but two have to be forgotten"),
        (["report"], "which says what a benchmark compares, cannot be read"),
    ],
)
def test_what_cannot_work_is_explained(arguments, message, tmp_path, capsys):
    assert main(["bench", *arguments, "--output", str(tmp_path / "results"), "--cache", str(tmp_path)]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "bench.db").exists()


def test_trials_may_be_kept_in_another_storage(tmp_path, monkeypatch, capsys):
    from eua.bench import people as people_module
    from eua.bench import workers as workers_module

    monkeypatch.setattr(workers_module, "run_trial", made_up_trial)
    trained = people_module.cached_model
    monkeypatch.setattr(people_module, "cached_model", lambda rows, cache, **more: trained(rows, cache, **more | SIZE))
    command = ["people", "--people", "20", "--target-epochs", "0.1", "--epochs", "1", "--trials", "1", "--seeds", "1"]
    command += ["--methods", "npo", "--workers", "1", "--cache", str(tmp_path / "cache")]
    shared = ["--storage", f"sqlite:///{tmp_path}/shared.db"]
    assert main(["bench", *command, *shared, "--output", str(tmp_path / "first")]) == 0
    assert not (tmp_path / "first" / "bench.db").exists()
    monkeypatch.setattr(workers_module, "run_trial", lambda *_, **__: pytest.fail("another machine's trial ran again"))
    assert main(["bench", *command, *shared, "--output", str(tmp_path / "second")]) == 0
    results = [(tmp_path / name / "results.json").read_text() for name in ("first", "second")]
    assert results[0] == results[1]
    assert main(["bench", "report", *shared, "--output", str(tmp_path / "second")]) == 0


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["bench", "people", "--output", str(tmp_path)]) == BAD_INPUT
    assert "is not empty, and its files could be lost" in capsys.readouterr().err


def test_it_writes_results_and_goes_on(tmp_path: Path, monkeypatch, capsys):
    from eua.bench import people as people_module
    from eua.bench import workers as workers_module

    monkeypatch.setattr(workers_module, "run_trial", made_up_trial)
    trained = people_module.cached_model
    monkeypatch.setattr(people_module, "cached_model", lambda rows, cache, **more: trained(rows, cache, **more | SIZE))
    output = tmp_path / "results"
    command = [
        "bench",
        "people",
        "--output",
        str(output),
        "--cache",
        str(tmp_path / "cache"),
        "--people",
        "20",
        "--workers",
        "1",
    ]
    command += ["--target-epochs", "0.1", "--epochs", "1", "--trials", "1", "--seeds", "1", "--methods", " grad_diff"]
    assert main([*command, "--limit", "1e-6"]) == 0
    assert "Trials are left: run the same command again to go on." in capsys.readouterr().out
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r" 3/3 +grad_diff +0 ", shown)
    assert "| method | said in any wording |" in shown
    results = json.loads((output / "results.json").read_text())
    assert results["complete"]
    assert (output / "results.md").read_text().startswith("## What was forgotten and what was kept")
    page = (output / "bench.html").read_text()
    (output / "bench.html").unlink()
    assert main(["bench", "report", "--output", str(output)]) == 0
    assert (output / "bench.html").read_text() == page
    settings = (output / "bench.json").read_text()
    people = command.index("20")
    for other, what in (
        ([*command[:people], "30", *command[people + 1 :]], "options {'people': 20"),
        (["bench", "facts", "--output", str(output)], "task 'people', but 'facts' was asked for"),
    ):
        assert main(other) == BAD_INPUT
        error = capsys.readouterr().err
        assert "holds a benchmark with the " + what in error
        assert "name another --output" in error
        assert (output / "bench.json").read_text() == settings
    (tmp_path / "cache").rename(tmp_path / "moved")  # where models are kept changes nothing
    assert main([str(tmp_path / "moved") if word == str(tmp_path / "cache") else word for word in command]) == 0
    settings = (output / "bench.json").read_text()
    monkeypatch.setattr(people_module, "TRAINING", {"per_device_train_batch_size": 4})
    for other in (["bench", "report", "--output", str(output)], [*command, "--cache", str(tmp_path / "moved"), "--seeds", "2"]):
        assert main(other) == BAD_INPUT
        assert "holds trials of people with other rows, models or settings" in capsys.readouterr().err
        assert (output / "bench.json").read_text() == settings

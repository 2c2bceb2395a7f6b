"""The whole benchmark on a tiny world: both phases, a killed process, what is kept, and the pages that are written."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eua import EnergyGuard
from eua.bench import run as run_module
from eua.bench import trial as trial_module
from eua.bench import workers as workers_module
from eua.bench.columns import SAID
from eua.bench.page import render_front, render_page
from eua.bench.results import Bench, _versions_of, results_of
from eua.bench.run import run_bench
from eua.bench.study import Done, Plan
from eua.bench.table import markdown, tables
from eua.bench.task import EvaluationSet, Task
from eua.bench.trial import RETAIN_ONLY, TARGET
from eua.bench.workers import work
from eua.errors import EUAError
from eua.evaluation.results import read_results
from eua.model.loading import load_model
from tests.bench.conftest import made_up_trial

METHODS = ["eua", "npo"]
PATIENCE = 120


@pytest.fixture(scope="module")
def bench(make_task, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("whole")
    return Bench("people", make_task, METHODS, trials=2, seeds=1, output=folder, heartbeat=1, grace=3)


@pytest.fixture(scope="module")
def results(bench):
    """Of an uninterrupted run."""
    return run_bench(bench, workers=1)


def test_the_task_splits_people_and_never_measures_what_it_tunes_on(make_task):
    task = make_task(0)
    rows = {
        (part, name): {row["question"] for row in one.rows}
        for part, sets in (("validation", task.validation), ("test", task.test))
        for name, one in sets.items()
    }
    for name in task.validation:
        assert rows["validation", name]
        assert not rows["validation", name] & rows["test", name]
    trained = {row["question"] for row in task.forget}
    assert rows["validation", "forget"] | rows["test", "forget"] == trained
    kept = {row["question"] for row in task.retain}
    assert rows["validation", "retain"] | rows["test", "retain"] == kept
    unseen = rows["validation", "retain, never seen"] | rows["test", "retain, never seen"]
    assert not unseen & (trained | kept | set(task.calibration))
    assert {fact.name for fact in task.forgotten_facts} == rows["test", "forget"]
    others = {fact.name for fact in task.facts if fact.group != "forget"}
    assert others
    assert others <= rows["test", "retain, never seen"]
    later = {row["question"] for row in task.second}
    assert later
    assert later < kept
    for row in [*task.forget, *task.second]:
        assert row["answer"] not in row["alternatives"]
    for row in task.test["forget"].rows:
        assert len(set(row["perturbed_answer"])) == 5
    assert task.digest == make_task(0).digest
    assert task.digest != replace(task, retain=task.retain[1:]).digest


def test_both_phases_are_complete(bench, results):
    assert results["complete"]
    tuned = [(trial["plan"]["method"], trial["plan"]["seed"]) for trial in results["tuning"]]
    assert tuned == [(TARGET, 0), (RETAIN_ONLY, 0), ("eua", 0), ("npo", 0), ("eua", 0), ("npo", 0)]
    assert {trial["plan"]["seed"] for trial in results["report"]} == {1}
    reported = {trial["plan"]["method"]: trial["result"] for trial in results["report"]}
    assert list(reported) == [TARGET, RETAIN_ONLY, "eua", "npo"]
    assert all(trial["error"] is None for trial in results["tuning"] + results["report"])
    for method in METHODS:
        chosen = results["chosen"][method]
        of_method = [trial for trial in results["tuning"] if trial["plan"]["method"] == method]
        assert chosen["settings"] in [trial["plan"]["settings"] for trial in of_method]
        result = reported[method]
        assert result["seconds"] > 0
        assert result["peak_bytes"] > 0
        assert result["task"] == results["digest"]
        # What is reported is not what won the choice.
        (tuned_one,) = (trial for trial in of_method if trial["plan"]["settings"] == chosen["settings"])
        assert tuned_one["result"]["weights"] != result["weights"]
        assert result["weights"] != reported[TARGET]["weights"]
    metrics = reported[TARGET]["metrics"]
    assert metrics["said"]["any wording"] > reported[RETAIN_ONLY]["metrics"]["said"]["any wording"]
    assert metrics["membership"]["loss"] == metrics["membership"]["reference"] == 1.0
    assert "reference" not in reported[RETAIN_ONLY]["metrics"]["membership"]  # it is the reference
    assert all(0 <= one["metrics"]["membership"]["gradient_norm"] <= 1 for one in reported.values())
    for model in (TARGET, RETAIN_ONLY):  # both were trained on them
        assert reported[model]["metrics"]["said"]["any wording, retained, never seen"] >= 0.5
    lasting = reported["npo"]["metrics"]["lasting"]
    assert lasting["in 8 bits"] == pytest.approx(reported["npo"]["objectives"]["forget"], abs=0.1)
    curves = reported["npo"]["metrics"]["relearning"]
    assert set(curves) == {"the same rows", "other forgotten rows", "rows of the same form", "unrelated texts"}
    for name, curve in curves.items():
        assert curve["0"] == pytest.approx(reported["npo"]["objectives"]["forget"])
        assert lasting[f"relearning on {name}"] == max(value for step, value in curve.items() if step != "0")
    assert curves["the same rows"]["20"] > curves["unrelated texts"]["20"]
    assert list(curves["the same rows"]) == ["0", "5", "20"]
    assert "after a second request, second rows" in lasting
    assert "after a second request, second rows" not in metrics["lasting"]
    wrapped = {model: reported[model]["metrics"]["wrapped"] for model in (TARGET, RETAIN_ONLY)}
    assert wrapped[TARGET]["said after a prefix"] >= wrapped[RETAIN_ONLY]["said after a prefix"]
    assert metrics["refused"].keys() == reported["eua"]["metrics"]["refused"].keys()
    (table,) = bench.output.glob("rows/npo-seed-1.parquet")
    assert {row["set"] for row in read_results(table)} >= {"forget", "retain"}
    (table,) = bench.output.glob("answers/npo-seed-1.parquet")
    answers = [row for row in read_results(table) if row["set"] == "forget" and row["way"] == "the questions"]
    said = reported["npo"]["metrics"]["said"]["share of answers"]
    assert said == pytest.approx(sum(row["says"] for row in answers) / len(answers))
    assert all(trial["result"]["seconds_in_all"] > trial["result"]["seconds"] for trial in results["tuning"][2:])
    assert reported[RETAIN_ONLY]["metrics"]["aggregates"]["forget_quality"] == 1.0


def test_models_of_chosen_trials_are_kept_and_others_are_not(bench, results):
    assert sorted(path.name for path in (bench.output / "models").iterdir()) == ["eua-seed-1", "npo-seed-1"]
    assert not list((bench.output / "running").glob("*"))
    folder = bench.output / next(t["result"]["model"] for t in results["report"] if t["plan"]["method"] == "eua")
    AutoModelForCausalLM.from_pretrained(folder)
    EnergyGuard.from_pretrained(folder)


def test_a_complete_benchmark_runs_nothing_again(bench, results, monkeypatch):
    monkeypatch.setattr(workers_module, "run_trial", lambda *_, **__: pytest.fail("a finished trial ran again"))
    assert run_bench(bench, workers=1) == results


def _work_slowly(bench: Bench, plans) -> None:
    """A worker that says when it is at its second method's trial, and then never ends."""
    run = workers_module.run_trial

    def run_trial(task, plan, phase, output, **options):
        if plan.method == "npo":
            (output / "stuck").touch()
            time.sleep(PATIENCE)
        return run(task, plan, phase, output, **options)

    workers_module.run_trial = run_trial
    work(bench, "tuning", plans)


def test_a_benchmark_whose_worker_was_killed_ends_as_an_uninterrupted_one(bench, results, tmp_path):
    broken = replace(bench, output=tmp_path)
    plans = broken.tuning_plans(broken.make_task(0))
    # Spawned: the threads of a process that has trained are not there in a fork, which waits for them forever.
    worker = multiprocessing.get_context("spawn").Process(target=_work_slowly, args=(broken, plans), daemon=True)
    worker.start()
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "stuck").exists():
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(PATIENCE)
    after_kill = broken.queue("tuning")
    states = [trial.state.name for trial in after_kill.study.get_trials()]
    assert states.count("RUNNING") == 1
    assert [trial.plan.method for trial in after_kill.done(plans)] == [TARGET, RETAIN_ONLY, "eua"]
    work(broken, "tuning", plans)
    again = results_of(broken, broken.make_task(0))
    assert _without_costs(again, "chosen", "tuning") == _without_costs(results, "chosen", "tuning")


def _without_costs(results, *keys: str) -> str:
    text = json.dumps({key: results[key] for key in keys})
    return re.sub(r'"(seconds|seconds_in_all|peak_bytes|number|trial)": [0-9.e+-]+', "", text)


def test_the_limit_begins_no_new_trial(bench, tmp_path):
    limited = replace(bench, output=tmp_path)
    results = run_bench(limited, workers=1, limit=1e-9)
    assert not results["complete"]
    assert results["tuning"] == []
    assert "not yet chosen" in markdown(tables(results))


def test_results_are_written_as_they_come(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "run_trial", made_up_trial)
    monkeypatch.setattr(run_module, "_WRITE", 0.0)
    came: list[int] = []
    again = replace(bench, output=tmp_path, methods=["grad_ascent"], seeds=1)
    run_bench(again, workers=1, so_far=lambda results: came.append(_ended(results)))
    assert came == [1, 2, 3, 4, 5, 6, 7]


def _ended(results) -> int:
    return len(results["tuning"]) + len(results["report"])


def test_models_are_kept_unless_they_are_not_wanted(bench, results, make_task, tmp_path):
    plan = Plan("grad_ascent", {"learning_rate": 1e-4, "num_train_epochs": 1}, 1)
    task = replace(make_task(1), facts=(), relearning_steps=(), second=())
    result = workers_module.run_trial(task, plan, "report", tmp_path, keep_model=False)
    assert "model" not in result
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["rows"]


def test_a_failed_trial_is_reported_and_the_others_go_on(bench, tmp_path, monkeypatch):
    def run_trial(task, plan, phase, output, **options):
        if plan.method == "npo":
            raise EUAError("The loss became nan at step 3: lower the learning rate.")
        return made_up_trial(task, plan, phase, output)

    monkeypatch.setattr(workers_module, "run_trial", run_trial)
    results = run_bench(replace(bench, output=tmp_path), workers=1)
    assert results["complete"]
    assert results["chosen"]["npo"] is None
    assert results["chosen"]["eua"] is not None
    text = markdown(tables(results))
    assert "2 of 2, 2 failed" in text
    for table in tables(results)[:-2]:  # without those of failed trials and of tuning
        assert [row[0] for row in table.rows] == [TARGET, RETAIN_ONLY, "eua", "npo (0 of 1 seeds)"]
    assert "EUAError: The loss became nan at step 3: lower the learning rate" in text
    assert "nan at step 3" in render_page(results)


def test_another_task_in_the_same_folder_is_refused(bench, results, make_task):
    def smaller(seed: int) -> Task:
        return replace(make_task(seed), retain=make_task(seed).retain[1:])

    other = replace(bench, make_task=smaller)
    with pytest.raises(EUAError, match="holds trials of people with other rows, models or settings"):
        run_bench(other, workers=1, checked=lambda: pytest.fail("it was not refused before that"))
    with pytest.raises(EUAError, match="holds trials of people with other rows, models or settings"):
        results_of(other, smaller(0))


def test_a_task_needs_sets_of_both_kinds(make_task):
    only_forget = {"forget": EvaluationSet([{"question": "Who?", "answer": "Ann."}], forget=True)}
    with pytest.raises(
        EUAError, match="The test sets of the task people are forget, but a method is judged.*give at least one"
    ):
        replace(make_task(0), test=only_forget)


def test_every_table_begins_with_what_is_said(results):
    made = tables(results)
    assert len(made) > 6
    assert [table.title for table in made[-2:]] == ["What was not measured", "Tuning"]
    for table in made[:-2]:
        assert table.head[:2] == ["method", SAID.heading], table.title
        assert [row[0].removesuffix(" †") for row in table.rows] == [TARGET, RETAIN_ONLY, "eua", "npo"]
    text = markdown(made)
    assert "| extraction strength, forget |" in text
    assert "nan" not in text


def test_the_page_is_self_contained_and_shows_every_trial(results):
    page = render_page(results)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "<script" not in page
    assert not re.search(r"(src|href)=|style=|url\(|@import", page)
    assert page.count('<circle cx="') + page.count('<circle class="chosen"') == 4 + len(METHODS)  # and the legend's
    assert page.count('<circle class="chosen"') == len(METHODS)
    assert page.count('<circle class="model"') == 2
    for table in tables(results):
        assert table.title.replace("“", "“") in page


def test_the_picture_alone_is_a_file_with_every_trial_and_method(results):
    picture = ElementTree.fromstring(render_front(results))
    circles = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2 * len(METHODS) + 2 + len(METHODS)  # trials, models, and the legend's
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for method in METHODS:
        assert [text for text in texts if text.startswith(method)]


def test_texts_on_the_page_are_escaped(results):
    hostile = json.loads(json.dumps(results).replace('"people"', '"<script>alert(1)</script>"'))
    page = render_page(hostile)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_results_so_far_can_be_read_at_any_time(bench, results):
    assert results_of(bench, bench.make_task(0)) == results


def test_two_workers_share_the_trials(bench, results, tmp_path, monkeypatch):
    """They are other processes, and come to the same weights. The results so far are written meanwhile."""
    monkeypatch.setattr(run_module, "_WRITE", 0.0)
    came: list[int] = []
    shared = replace(bench, output=tmp_path, methods=["eua"])
    again = run_bench(shared, workers=2, so_far=lambda results: came.append(_ended(results)))
    assert came == sorted(came)
    assert len(set(came)) > 2
    assert again["complete"]
    for phase in ("tuning", "report"):
        expected = [trial for trial in results[phase] if trial["plan"]["method"] != "npo"]
        assert _without_costs(again, phase) == _without_costs({phase: expected}, phase)


def test_versions_that_differ_among_trials_are_collected(results):
    assert len(results["versions_of_trials"]) == 1
    done = [Done(Plan("npo", {}, seed), seed, {"versions": {"eua": eua}}, None) for seed, eua in enumerate(("1", "2", "1"))]
    assert _versions_of([*done, Done(Plan("npo", {}, 3), 3, None, "it failed")]) == [{"eua": "1"}, {"eua": "2"}]


def _sleep_with_a_parent(folder: Path) -> None:
    workers_module._end_with_parent()
    (folder / str(os.getpid())).touch()
    time.sleep(PATIENCE)


def _start_a_sleeper(folder: Path) -> None:
    multiprocessing.get_context("spawn").Process(target=_sleep_with_a_parent, args=(folder,), daemon=True).start()
    time.sleep(PATIENCE)


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=_start_a_sleeper, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + PATIENCE
    while not (started := list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(PATIENCE)
    worker = int(started[0].name)
    deadline = time.monotonic() + 10
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _lives(worker)


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_trial_with_an_adapter_gives_a_model_without_one(make_task, tmp_path):
    """It says the same, and can unlearn again."""
    task = make_task(0)
    settings = {"distinct_directions": 4, "learning_rate": 1e-2, "num_train_epochs": 1}
    before, _ = load_model(task.target)
    model, tokenizer, _ = trial_module._unlearned(task, Plan("eua_distinct", settings, 0), tmp_path)
    assert isinstance(model, PreTrainedModel)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = [name for (name, new), old in pairs if not torch.equal(new, old)]
    assert changed
    assert all("down_proj" in name for name in changed)
    again = trial_module._unlearned_again(
        task, Plan("eua_distinct", settings, 1), tmp_path, tokenizer, model, task.second, task.forget
    )
    assert isinstance(again, PreTrainedModel)

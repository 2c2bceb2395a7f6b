"""Trials that several processes take: one each, none twice, and again if a process dies."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import optuna
import pytest

from eua.bench import study as study_module
from eua.bench.study import ATTEMPTS, Plan, TrialQueue, default_storage
from eua.errors import EUAError

PLANS = [Plan("npo", {"beta": place}, 0) for place in range(24)]
RESULT = {"objectives": {"forget": 0.25, "retain": 1.0}}
PATIENCE = 60


def queue(folder: Path, **options) -> TrialQueue:
    return TrialQueue(default_storage(folder), "test", heartbeat=1, grace=2, **options)


def take_all(folder: Path, results) -> None:
    trials, taken = queue(folder), []
    trials.add(PLANS)
    while (one := trials.take(PLANS)) is not None:
        with trials.alive(one[0]):
            taken.append(one[1].settings["beta"])
            trials.finish(one[0], RESULT)
    results.put(taken)


def hold_one(folder: Path, results) -> None:
    trials = queue(folder)
    trial, plan = trials.take(PLANS[:1])
    with trials.alive(trial):
        results.put(plan.key)
        time.sleep(PATIENCE)


def test_processes_never_take_the_same_trial(tmp_path):
    queue(tmp_path)
    context = get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=take_all, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    taken = [beta for _ in processes for beta in results.get(timeout=PATIENCE)]
    for process in processes:
        process.join(PATIENCE)
    assert sorted(taken) == list(range(24))
    done = queue(tmp_path).done(PLANS)
    assert [trial.plan for trial in done] == PLANS
    assert all(trial.result == RESULT for trial in done)


def test_the_trial_of_a_killed_process_is_handed_out_again(tmp_path):
    trials = queue(tmp_path)
    trials.add(PLANS[:1])
    context = get_context("fork")
    results = context.Queue()
    process = context.Process(target=hold_one, args=(tmp_path, results))
    process.start()
    assert results.get(timeout=PATIENCE) == PLANS[0].key
    time.sleep(3)  # longer than the grace period: the heartbeat is what keeps the trial
    trials.add(PLANS[:1])
    assert trials.take(PLANS[:1]) is None
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    deadline, taken = time.monotonic() + PATIENCE, None
    while taken is None and time.monotonic() < deadline:
        trials.add(PLANS[:1])
        taken = trials.take(PLANS[:1])
        time.sleep(0.2)
    assert taken is not None
    trials.finish(taken[0], RESULT)
    assert [trial.result for trial in trials.done(PLANS[:1])] == [RESULT]


def test_a_finished_or_failed_trial_is_not_handed_out_again(tmp_path):
    trials = queue(tmp_path)
    trials.add(PLANS[:2])
    first, second = trials.take(PLANS[:2]), trials.take(PLANS[:2])
    trials.finish(first[0], RESULT)
    trials.fail(second[0], ValueError("the loss became nan"))
    again = queue(tmp_path)
    again.add(PLANS[:2])
    assert again.take(PLANS[:2]) is None
    assert len(again.study.get_trials()) == 2
    done = again.done(PLANS[:2])
    assert [trial.error for trial in done] == [None, "ValueError: the loss became nan"]
    assert done[1].result is None


def test_an_interrupted_trial_waits_again_however_often(tmp_path):
    trials = queue(tmp_path)
    for _ in range(ATTEMPTS + 1):
        trials.add(PLANS[:1])
        trial, _ = trials.take(PLANS[:1])
        with pytest.raises(KeyboardInterrupt), trials.alive(trial):
            raise KeyboardInterrupt
    trials.add(PLANS[:1])
    assert trials.done(PLANS[:1]) == []
    assert trials.take(PLANS[:1]) is not None


def test_a_trial_whose_process_always_dies_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "ATTEMPTS", 1)
    trials = queue(tmp_path)
    trials.add(PLANS[:1])
    trials.take(PLANS[:1])
    deadline = time.monotonic() + PATIENCE
    while not trials.done(PLANS[:1]) and time.monotonic() < deadline:
        trials.add(PLANS[:1])
        time.sleep(0.3)
    (trial,) = trials.done(PLANS[:1])
    assert trial.error == "its process died 1 times (out of memory?)"


def test_a_late_result_of_a_process_that_seemed_dead_is_dropped(tmp_path):
    trials = queue(tmp_path)
    trials.add(PLANS[:1])
    late, _ = trials.take(PLANS[:1])
    deadline, again = time.monotonic() + PATIENCE, None
    while again is None and time.monotonic() < deadline:
        trials.add(PLANS[:1])
        again = trials.take(PLANS[:1])
        time.sleep(0.3)
    trials.finish(late, {"objectives": {"forget": 9.0, "retain": 9.0}})
    trials.finish(again[0], RESULT)
    assert [trial.result for trial in trials.done(PLANS[:1])] == [RESULT]


def test_a_study_of_something_else_is_refused(tmp_path):
    queue(tmp_path).belongs_to("abc", "people")
    queue(tmp_path).belongs_to("abc", "people")
    with pytest.raises(
        EUAError, match="The study test holds trials of people with other rows, models or settings.*name another"
    ):
        queue(tmp_path).belongs_to("xyz", "people")


def test_a_database_server_is_asked_whether_a_connection_still_lives(monkeypatch):
    """SQLite waits for a lock instead, and its engine gets no pool_pre_ping."""
    opened = []

    class Storage(optuna.storages.RDBStorage):
        def __init__(self, url, *, engine_kwargs, **options):
            opened.append((url, engine_kwargs))
            super().__init__("sqlite:///:memory:", **options)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Storage)
    TrialQueue("postgresql://user:secret@server/bench", "test").add([Plan("npo", {}, 0)])
    assert opened == [("postgresql://user:secret@server/bench", {"pool_pre_ping": True})]


def test_a_storage_that_cannot_be_opened_is_explained_without_its_password(tmp_path):
    with pytest.raises(EUAError, match=r"The trials cannot be kept in sqlite://….*check the URL") as error:
        TrialQueue(f"sqlite:///{tmp_path}/no/such/folder/bench.db", "test")
    assert "no/such" not in str(error.value)

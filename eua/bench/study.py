"""Trials that any number of processes, on any number of machines, take from one study of Optuna and finish.

A trial that a process is working on has a heartbeat. If that stops, because the process was killed, the trial is handed out
again. A finished trial never is, so a benchmark that was interrupted goes on where it stopped.

Nobody has to be in charge: whoever finds a planned trial missing from the study adds it. Two processes may do so at the same
time. Of several trials with the same plan only the first one counts, unless its process died.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eua.bench.grids import settings_key
from eua.errors import EUAError, in_one_line

DIRECTIONS = {"forget": "minimize", "retain": "maximize"}  # of the two values of a trial, as Optuna's dashboard shows them
HEARTBEAT = 10  # seconds between two signs of life
GRACE = 60  # seconds without one, after which a process counts as dead
ATTEMPTS = 5  # of a trial whose process dies each time
_SQLITE_PATIENCE = 120  # seconds that a process waits for others to finish writing


@dataclass(frozen=True)
class Plan:
    """One trial to run: a method with its settings and a seed. ``method`` may also be one of the models to compare with."""

    method: str
    settings: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        return settings_key(asdict(self))


@dataclass(frozen=True)
class Done:
    """A trial that has ended: with a result, or with an error."""

    plan: Plan
    number: int
    result: dict[str, Any] | None
    error: str | None


class TrialQueue:
    """The trials of one study.

    Args:
        url: of Optuna's storage, e.g. ``"sqlite:///results/bench.db"`` or that of a PostgreSQL or MySQL server.
        study: its name.
        heartbeat, grace: see :data:`HEARTBEAT` and :data:`GRACE`, in whole seconds.

    Raises:
        EUAError: if Optuna is missing, or if the storage cannot be opened.
    """

    def __init__(self, url: str, study: str, *, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> None:
        optuna = _optuna()
        sqlite = url.startswith("sqlite")
        with _explained(url):
            self.storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": _SQLITE_PATIENCE}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=grace,
            )
            if sqlite:
                _serialize(self.storage.engine)
            self.study = optuna.create_study(
                storage=self.storage, study_name=study, directions=list(DIRECTIONS.values()), load_if_exists=True
            )
        self.heartbeat = heartbeat
        self._states = optuna.trial.TrialState
        self._fail_stale_trials = optuna.storages.fail_stale_trials
        self._finished = optuna.exceptions.UpdateFinishedTrialError
        self._storage_error = optuna.exceptions.StorageInternalError

    def belongs_to(self, digest: str, what: str) -> None:
        """Remember what the study is about; raise if it is about something else.

        Raises:
            EUAError: if so.
        """
        known = self.study.user_attrs.get("digest")
        if known is None:
            self.study.set_user_attr("digest", digest)
        elif known != digest:
            raise EUAError(
                f"The study {self.study.study_name} holds trials of {what} with other rows, models or settings, and figures of "
                "both cannot be compared: name another output folder (and, with --storage, another storage)."
            )

    def add(self, plans: Sequence[Plan]) -> None:
        """Add the plans that are missing, and those whose process died, to the trials that wait."""
        waiting = self._states.WAITING
        self._fail_stale_trials(self.study)
        trials = self._by_key()
        for plan in plans:
            of_plan = trials.get(plan.key, [])
            if self._counting(of_plan) is None and _attempts(of_plan) < ATTEMPTS:
                # The plan is a user attribute: Optuna's parameters would have to have one set of values for all methods.
                trial = _optuna().trial.create_trial(state=waiting, user_attrs={"key": plan.key, "plan": asdict(plan)})
                self.study.add_trial(trial)

    def take(self, plans: Sequence[Plan]) -> tuple[int, Plan] | None:
        """The id of a trial that waits, and its plan; None if there is none. No other process gets it."""
        trials = self._by_key()
        for plan in plans:
            trial = self._counting(trials.get(plan.key, []))
            if trial is None or trial.state != self._states.WAITING:
                continue
            number = self._id(trial.number)
            self.storage.record_heartbeat(number)  # before it runs: Optuna hands out no trial again that never had a heartbeat
            try:
                if self.storage.set_trial_state_values(number, state=self._states.RUNNING):
                    return number, plan
            except self._finished:
                continue
        return None

    @contextmanager
    def alive(self, trial: int) -> Iterator[None]:
        """Give a trial a heartbeat while the block runs. If an exception that is no error ends it, the trial waits again."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.heartbeat):
                with suppress(self._storage_error):  # the next one may arrive
                    self.storage.record_heartbeat(trial)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):  # KeyboardInterrupt
                self._end(trial, self._states.FAIL, {"interrupted": True})
            raise
        finally:
            stop.set()
            thread.join()

    def finish(self, trial: int, result: Mapping[str, Any]) -> None:
        """Keep the result of a trial: a mapping for JSON, of which "objectives" has the values of :data:`DIRECTIONS`."""
        values = [result["objectives"][name] for name in DIRECTIONS]
        self._end(trial, self._states.COMPLETE, {"result": dict(result)}, values)

    def fail(self, trial: int, error: Exception) -> None:
        """Keep the error that ended a trial. It is not handed out again."""
        texts = {
            "error": f"{type(error).__name__}: {in_one_line(error)}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        self._end(trial, self._states.FAIL, texts)

    def _end(self, trial: int, state: Any, attributes: Mapping[str, Any], values: Sequence[float] | None = None) -> None:
        with suppress(self._finished):  # it was handed out again, since this process seemed to be dead
            for name, value in attributes.items():
                self.storage.set_trial_user_attr(trial, name, value)
            self.storage.set_trial_state_values(trial, state=state, values=values)

    def done(self, plans: Sequence[Plan]) -> list[Done]:
        """The plans that have ended, in their order."""
        trials = self._by_key()
        ended = []
        for plan in plans:
            of_plan = trials.get(plan.key, [])
            trial = self._counting(of_plan)
            if trial is not None and trial.state.is_finished():
                attributes = trial.user_attrs
                ended.append(Done(plan, trial.number, attributes.get("result"), attributes.get("error")))
            elif trial is None and _attempts(of_plan) >= ATTEMPTS:
                died = f"its process died {ATTEMPTS} times (out of memory?)"
                ended.append(Done(plan, of_plan[-1].number, None, died))
        return ended

    def _by_key(self) -> dict[str, list[Any]]:
        trials: dict[str, list[Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):  # in the order of their numbers
            trials.setdefault(trial.user_attrs.get("key", ""), []).append(trial)
        return trials

    def _counting(self, trials: Sequence[Any]) -> Any | None:
        """The trial that counts among those of one plan: the first whose process did not die."""
        failed = self._states.FAIL
        return next((trial for trial in trials if trial.state != failed or "error" in trial.user_attrs), None)

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return int(self.storage.get_trial_id_from_study_id_trial_number(study, number))


def _attempts(trials: Sequence[Any]) -> int:
    """How many of the trials of one plan lost their process. A user may interrupt a trial as often as they like."""
    return sum("interrupted" not in trial.user_attrs for trial in trials)


def default_storage(output: Path) -> str:
    """The URL of a SQLite file in the output folder."""
    return f"sqlite:///{output.absolute() / 'bench.db'}"


def _serialize(engine: Any) -> None:
    """Let every transaction lock the database of SQLite when it begins.

    SQLite has no SELECT … FOR UPDATE, so two processes could both see that a trial waits, and both take it.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_transactions_alone(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 would begin them later, when something is written

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of SQLAlchemy, Optuna and the driver of a database, without another common base class
        if isinstance(error, EUAError):
            raise
        raise EUAError(
            f"The trials cannot be kept in {url.partition('://')[0]}://… ({in_one_line(error)}): check the URL, that the "
            "server is running, and that its Python driver is installed. Without --storage they are kept in the output folder."
        ) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise EUAError(
            'The benchmark was started, but Optuna, which keeps its trials, is not installed: pip install "eua[bench]".'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats
    return optuna

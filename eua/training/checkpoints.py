"""CheckpointingTrainer: checkpoints that are whole or absent, the best one among them, and runs that stop to be resumed.

A model is saved, and pushed, with its card and without pickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from eua.distributed import local_shard
from eua.errors import EUAError, in_one_line
from eua.files import fill_folder, flush_folder, replacing, write_json, writing
from eua.model.forgotten import write_forgotten
from eua.model.forward import check_finite
from eua.training.model_card import CARD_FILE
from eua.training.stopping import StopOnSignal

STAGING_FOLDER = ".checkpoint.partial"
HUB_FOLDER = "hub"
TRAINING_ARGS_PICKLE = "training_args.bin"
FILE_LIST = "files.json"

_BLOCK, _BLOCKS = 2**16, 64  # bytes, and their number


def checkpoint_folder(output_folder: Path, step: int) -> Path:
    return output_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_checkpoint(output_folder: Path) -> Path | None:
    """The newest checkpoint in a trainer's output folder, or None. Every folder with a checkpoint's name is whole."""
    found = get_last_checkpoint(str(output_folder)) if output_folder.is_dir() else None
    return None if found is None else Path(found)


class SaveBest(TrainerCallback):
    """Saves each new best model, which ``load_best_model_at_end`` must find, even when no checkpoint is due."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not args.load_best_model_at_end or args.metric_for_best_model is None:
            return
        is_better, worst = (operator.gt, -math.inf) if args.greater_is_better else (operator.lt, math.inf)
        value = (metrics or {}).get(f"eval_{args.metric_for_best_model.removeprefix('eval_')}")
        # Trainer compares in the same way, but after this event.
        if value is not None and is_better(value, worst if state.best_metric is None else state.best_metric):
            control.should_save = True


class CheckpointingTrainer(Trainer):
    """Trainer, but a folder called ``checkpoint-N`` is always whole, and a signal ends training with one to resume from."""

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.stop_on_signal = StopOnSignal()
        self._is_saving_checkpoint = False
        self._saved_step: int | None = None
        super().__init__(*args, callbacks=[*(callbacks or []), SaveBest(), self.stop_on_signal], **kwargs)

    @property
    def output_folder(self) -> Path:
        return Path(self.args.output_dir)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint into a staging folder, then rename it."""
        output_folder, step = self.output_folder, self.state.global_step
        place = checkpoint_folder(output_folder, step)
        if self._saved_step == step:
            # Trainer may ask a second time at the end of an epoch. At most an evaluation has happened in between.
            self._save_state(place)
            return
        self.check_weights()
        staging = output_folder / STAGING_FOLDER
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._is_saving_checkpoint = True
        try:
            # Checkpoints hold pickles, so they are never pushed, even if hub_strategy was changed after EUAConfig checked it.
            with writing(place), changed(self.args, output_dir=str(staging), push_to_hub=False):
                super()._save_checkpoint(model, trial)
        except BaseException:  # a part of a checkpoint is of no use, and takes space that may be missing
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._is_saving_checkpoint = False
        self.accelerator.wait_for_everyone()
        self._save_state(staging / place.name)
        if self.args.should_save:
            with writing(place):
                list_files(staging / place.name)
                flush_folder(staging / place.name)
            publish(staging / place.name, output_folder)
            limit = self.args.save_total_limit
            superfluous = saved_steps(output_folder)[:-limit] if limit and limit > 0 else []
            delete_checkpoints(output_folder, set(superfluous) - {self.state.best_global_step})
        self.accelerator.wait_for_everyone()  # from here on every process finds the checkpoint in its place
        self._saved_step = step

    def _save_state(self, folder: Path) -> None:
        """Write the trainer's state again: Trainer has named the best checkpoint by its place in the staging folder."""
        is_best = self.state.best_global_step == self.state.global_step
        best = self._best_checkpoint()
        self.state.best_model_checkpoint = str(best) if is_best or best.is_dir() else None
        if self.args.should_save:
            with replacing(folder / TRAINER_STATE_NAME) as temporary:
                self.state.save_to_json(str(temporary))

    def _best_checkpoint(self) -> Path:
        """Where the best step's checkpoint belongs; the output folder may have been moved before the run was resumed."""
        return checkpoint_folder(self.output_folder, self.state.best_global_step or 0)

    def is_interrupted(self) -> bool:
        """Whether a signal has ended training before its last step."""
        return self.stop_on_signal.received is not None and self.state.global_step < self.state.max_steps

    def check_weights(self) -> None:
        """Raise if a step has made weights NaN or infinite, so that they are not saved."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                check_finite(local_shard(parameter).detach(), f"the weights {name} after step {self.state.global_step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's. Trainer's last call, with the metrics of all of training, comes before it loads the best model.

        When training is interrupted, the best model must not be loaded, and with ``save_total_limit=1`` Trainer would delete
        all checkpoints but the best one, while a resumed run needs the newest. Otherwise they are deleted here, so that none
        is ever half deleted.
        """
        best = self._best_checkpoint()
        has_best = best.is_dir() and not self.is_interrupted()
        self.state.best_model_checkpoint = str(best) if has_best else None
        if "train_runtime" in logs and has_best and self.args.save_total_limit == 1 and self.args.should_save:
            delete_checkpoints(self.output_folder, set(saved_steps(self.output_folder)) - {self.state.best_global_step})
        super().log(logs, start_time)

    # ---- the model ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but whole or not at all, with the model's card and without the pickle of the arguments.

        Where FSDP2 saves checkpoints in shards (its default), Trainer saves no model and does not report that; this saves the
        full weights.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        is_in_shards = plugin is not None and "FULL" not in str(plugin.state_dict_type)
        if is_in_shards and self._is_saving_checkpoint:
            return  # Trainer saves the weights in shards with the optimizer's state
        folder = Path(output_dir or self.args.output_dir)
        is_for_hub = _internal_call and folder.parent.name == HUB_FOLDER

        def write(folder: Path) -> None:
            full_weights = changed(plugin, state_dict_type="FULL_STATE_DICT") if is_in_shards else nullcontext()
            with full_weights:
                super(CheckpointingTrainer, self).save_model(str(folder), _internal_call=True)

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / TRAINING_ARGS_PICKLE).unlink(missing_ok=True)
            if not is_for_hub:  # where anyone could confirm a guess with the digests
                write_forgotten(folder, self.forgotten_prompts)
            (folder / CARD_FILE).write_text(self.model_card(), encoding="utf-8")  # instead of PEFT's, which names local paths

        if self.args.should_save:
            fill_folder(folder, write_all)
        else:
            write(folder)  # writes nothing, but takes part in gathering the weights
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the card again into ``output_dir``, with metadata of one's own (``license="mit"``)."""
        if self.is_world_process_zero():
            with replacing(self.output_folder / CARD_FILE) as temporary:
                temporary.write_text(self.model_card(**metadata), encoding="utf-8")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but only the model and its card are pushed, from ``output_dir/hub``, where they are saved first.

        Trainer would push ``output_dir`` itself, with the boundaries, the logs and any other file in it.

        Raises:
            EUAError: if the hub does not take it; what was to be pushed is in that folder.
        """
        name = self.output_folder.absolute().name  # Trainer names the repository after the folder
        folder = self.output_folder / HUB_FOLDER / name
        with changed(self.args, output_dir=str(folder)), _hub_explained(f"it is saved in {folder}, so `hf upload` can push it"):
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which creates the repository before training."""
        with _hub_explained("set push_to_hub = False to train without"):
            super().init_hf_repo(*args, **kwargs)


@contextmanager
def _hub_explained(advice: str) -> Iterator[None]:
    try:
        yield
    except EUAError:
        raise
    except Exception as error:  # from huggingface_hub and its HTTP client, whose errors have no other common base class
        raise EUAError(
            f"The model cannot be pushed to the hub ({in_one_line(error)}): check the connection, the name and that you are "
            f"logged in (`hf auth login`); {advice}."
        ) from error


@contextmanager
def changed(target: object, **attributes: Any) -> Iterator[None]:
    """Change attributes of ``target`` inside a ``with`` block."""
    earlier = {name: getattr(target, name) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in earlier.items():
            setattr(target, name, value)


def list_files(checkpoint: Path) -> None:
    """Write down which files a checkpoint has, so that a resumed run does not go on from a part of them.

    The trainer's state is not among them, since it may be written again, see :meth:`CheckpointingTrainer._save_state`.
    """
    names = (path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file())
    write_json(checkpoint / FILE_LIST, {name: _digest(checkpoint / name) for name in names if name != TRAINER_STATE_NAME})


def read_checkpoint(checkpoint: Path) -> TrainerState:
    """The trainer's state in a checkpoint that is to be resumed from, of which every file must be as it was written.

    Raises:
        EUAError: if one is missing or damaged (Trainer would go on without the optimizer's), or if only the model was saved.
            The error names the newest of the other checkpoints that are whole.
    """
    if damage := _find_damage(checkpoint):
        path, error = damage
        others = [checkpoint_folder(checkpoint.parent, step) for step in saved_steps(checkpoint.parent)]
        whole = [other for other in others if other.name != checkpoint.name and not _find_damage(other)]
        advice = f"delete {checkpoint} to resume from {whole[-1].name}, which is whole" if whole else None
        if (checkpoint / TRAINER_STATE_NAME).is_file() and not (checkpoint / FILE_LIST).exists():
            raise EUAError(
                f"{checkpoint} has no {FILE_LIST}, so it may be from an earlier version, and such a checkpoint cannot be "
                f"resumed with this one: {advice or 'resume it with the version that saved it'}, or start again."
            ) from error
        raise EUAError(
            f"{path} is missing or damaged ({in_one_line(error)}), and without it the run would end with other weights: "
            f"{advice or 'put the file back'}, or start again."
        ) from error
    if not any("optim" in name for name in _listed_files(checkpoint)):
        raise EUAError(
            f"{checkpoint} has only the model, since it was saved with save_only_model = True, so training cannot go on from "
            "there to the same weights: start again, with save_only_model = False."
        )
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _find_damage(checkpoint: Path) -> tuple[Path, Exception] | None:
    """The first file of a checkpoint that is not as it was written, and why."""
    path = checkpoint / FILE_LIST
    try:
        for name, digest in _listed_files(checkpoint).items():
            path = checkpoint / name
            if _digest(path) != digest:
                raise ValueError("it has another content than was written")
        path = checkpoint / TRAINER_STATE_NAME
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return path, error
    return None


def _listed_files(checkpoint: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((checkpoint / FILE_LIST).read_text(encoding="utf-8"))
    return files


def _digest(path: Path) -> list[int | str]:
    """A file's size, and the SHA-256 of up to 64 blocks spread evenly over it: whole files of many gigabytes take minutes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    step = max(_BLOCK, size // _BLOCKS)
    with path.open("rb") as file:
        for start in [*range(0, size, step), max(0, size - _BLOCK)]:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return [size, digest.hexdigest()]


def publish(written: Path, output_folder: Path) -> None:
    """Move a checkpoint from the staging folder to its place."""
    place = output_folder / written.name
    if place.exists():  # the run was resumed from an earlier step and has made this one again
        os.replace(place, written.with_name("replaced"))
    os.replace(written, place)


def saved_steps(output_folder: Path) -> list[int]:
    """The steps of all checkpoints, oldest first."""
    names = (path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in output_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return sorted(int(name) for name in names if name.isdigit())


def delete_checkpoints(output_folder: Path, steps: Iterable[int]) -> None:
    """Delete checkpoints, and the staging folder: they are moved into it first, so that none is ever half deleted."""
    staging = output_folder / STAGING_FOLDER
    staging.mkdir(exist_ok=True)
    for step in steps:
        os.replace(checkpoint_folder(output_folder, step), staging / f"deleted-{step}")
    shutil.rmtree(staging, ignore_errors=True)

"""Nothing is lost: checkpoints that are whole or absent, the best one among them, and runs that stop to be resumed.

A model is saved, and pushed, with its card and without pickles.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from eua.distributed import local_part
from eua.files import fill_folder, replacing
from eua.model.forward import check_finite
from eua.training.model_card import CARD_FILE
from eua.training.stopping import StopOnSignal

STAGING_FOLDER = ".checkpoint.partial"
HUB_FOLDER = "hub"
TRAINING_ARGS_PICKLE = "training_args.bin"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None. Every folder that bears the name is whole."""
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    return None if found is None else Path(found)


class CheckpointingTrainer(Trainer):
    """Trainer, but a folder called ``checkpoint-N`` is always whole, and a signal ends a run with one to resume from."""

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.stop_on_signal = StopOnSignal()
        self._staging: Path | None = None
        self._saved_step: int | None = None
        super().__init__(*args, callbacks=[*(callbacks or []), self.stop_on_signal], **kwargs)

    @property
    def run_folder(self) -> Path:
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name; a folder called ``checkpoint-N`` is always whole."""
        run = self.run_folder
        place = checkpoint_folder(run, self.state.global_step)
        if self._saved_step == self.state.global_step:
            # At the end of an epoch Trainer may ask twice; all that can have come between is an evaluation.
            self._save_state(place)
            return
        self.check_weights()
        staging = run / STAGING_FOLDER
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        self._save_state(staging / place.name)
        if self.args.should_save:
            publish(staging / place.name, run)
            delete_old_checkpoints(run, self.args.save_total_limit, self.state.best_global_step)
        self._saved_step = self.state.global_step

    def _save_state(self, folder: Path) -> None:
        """Write the trainer's state, in which Trainer would name the best checkpoint by where it was staged."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint_folder(self.run_folder, self.state.global_step))
        if self.args.should_save:
            with replacing(folder / TRAINER_STATE_NAME) as temporary:
                self.state.save_to_json(str(temporary))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's, but what load_best_model_at_end shall load is saved, however rarely checkpoints are."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        best = checkpoint_folder(self.run_folder, self.state.best_global_step or 0)
        # By its step, since the run's folder may have been moved before resuming. Of an interrupted run it is neither loaded
        # nor, as Trainer does with save_total_limit=1, left alone: the newest checkpoint is what a resume needs.
        self.state.best_model_checkpoint = str(best) if best.is_dir() and not self.is_interrupted() else None
        return super()._finalize_training(*args, **kwargs)

    def is_interrupted(self) -> bool:
        return self.stop_on_signal.received is not None and self.state.global_step < self.state.max_steps

    def check_weights(self) -> None:
        """Raise rather than save weights that a step has ruined."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                check_finite(local_part(parameter).detach(), f"the weights {name} after step {self.state.global_step}")

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, which saves no weights and does not say so where FSDP2 keeps checkpoints in parts (its default)."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if _internal_call or plugin is None or "FULL" in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer's, but whole or not at all, with the model's card and without the pickle of the arguments."""
        if not self.args.should_save:
            return

        def write(folder: Path) -> None:
            super(CheckpointingTrainer, self)._save(str(folder), state_dict)
            (folder / TRAINING_ARGS_PICKLE).unlink(missing_ok=True)
            (folder / CARD_FILE).write_text(self.model_card(), encoding="utf-8")  # in place of PEFT's, which names local paths

        fill_folder(Path(output_dir or self.args.output_dir), write)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the card again, with metadata of one's own (``license="mit"``), into ``output_dir``."""
        if self.is_world_process_zero():
            with replacing(self.run_folder / CARD_FILE) as temporary:
                temporary.write_text(self.model_card(**metadata), encoding="utf-8")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but what goes up is the model and its card alone, saved for it in ``output_dir/hub``.

        Trainer would push ``output_dir`` itself, with the boundaries, logs and whatever else lies there.
        """
        run = self.run_folder
        self.args.output_dir = str(run / HUB_FOLDER / run.absolute().name)  # a repository without a name gets the folder's
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self.args.output_dir = str(run)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Never, even where ``hub_strategy`` was changed after EUAConfig checked it: a checkpoint holds pickles."""


def publish(written: Path, run: Path) -> None:
    """Move a checkpoint out of its staging folder to its place, and remove the staging folder."""
    staging, place = written.parent, run / written.name
    if place.exists():  # a step that is trained again after resuming from an earlier one
        os.replace(place, staging / "replaced")
    os.replace(written, place)
    shutil.rmtree(staging)


def delete_old_checkpoints(run: Path, limit: int | None, best_step: int | None) -> None:
    """Delete all but the newest ``limit`` checkpoints; the best one, where there is one, stays besides them."""
    steps = sorted(int(path.name.rpartition("-")[2]) for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    for step in steps[:-limit] if limit and limit > 0 else []:
        if step != best_step:
            shutil.rmtree(checkpoint_folder(run, step), ignore_errors=True)

"""One process of several: trains as its file of settings says. Started by test_distributed.py through a launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from eua import EUAConfig, EUATrainer


def let_fsdp_run_on_cpus() -> None:
    """accelerate turns to FSDP where processes have GPUs; here it takes the processes of a CPU for such."""
    start = PartialState.__init__

    def patched(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


class SignalAt(TrainerCallback):
    """Only one process gets the signal to stop."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(output: Path, model: str, rows: dict[str, str], options: dict[str, Any]) -> None:
    stop_at, lora, resume = (options.pop(name, None) for name in ("stop_at", "lora", "resume"))
    zero3 = options.pop("zero3", None)
    args = EUAConfig(
        output_dir=str(output / "run"),
        **({"deepspeed": zero3} if zero3 else {}),
        **{"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"} | options,
    )
    torch.manual_seed(0)
    trainer = EUATrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args,
        forget_dataset=rows["forget"],
        retain_dataset=rows["retain"],
        eval_forget_dataset=rows["calibration"],
        eval_retain_dataset=rows["test"],
        ref_model=model if args.needs_model_before else None,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        callbacks=[] if stop_at is None else [SignalAt(stop_at)],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            (output / "interrupted").write_text(str(trainer.state.global_step))
        return
    trainer.save_model(str(output / "model"))
    trainer.save_model(str(output / "pushed"), _internal_call=True)  # as push_to_hub does
    if trainer.is_world_process_zero():
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_cpus()
    for name, options in settings["runs"]:
        train(Path(settings["output"]) / name, settings["model"], settings["rows"], options)
    sys.stdout.flush()
    os._exit(0)  # torch's caches hold the process group of FSDP2, see end_process_group

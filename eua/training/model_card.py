"""The README.md of a saved model: method, settings, data, figures, limits. Rows are named by a digest, never shown."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from transformers import Trainer

from eua.data.rows import rows_digest
from eua.training.config import EVAL_METRICS, EUAConfig

CARD_FILE = "README.md"
TAGS = ("eua", "unlearning")
# Settings that are shown where they are not the default.
_IF_SET = (
    *("preset", "forget_tokens", "gradient_filter", "sign_gate", "distinct_directions", "retain_sampler"),
    *("labels", "system_prompt", "hide_padding_ids", "as_released"),
)
PACKAGES = ("eua", "torch", "transformers", "accelerate", "peft")
ENERGY_METHOD = """\
*Distinguishable Deletion* (D², [arXiv 2605.16776](https://arxiv.org/abs/2605.16776)) as the library `eua` has it. The energy of
a token is `E = −T·logsumexp(logits/T)`. Training lifts the answer tokens of the forget set above one energy boundary each, and
keeps those of the retain set below theirs and {kept}. Boundaries are {boundaries}.
The rule by which prompts are refused (`EnergyGuard`) is `eua`'s own: the paper does not give one in detail."""
GUARDED_USE = """
from eua import EnergyGuard

# held_out_rows: prompts that must be answered and that unlearning has not seen; at 5 %, 19 or more
guard = EnergyGuard.calibrate(model, tokenizer, held_out_rows, tolerance=0.05, temperature={temperature:g})
guard.save_pretrained("guard")
with guard.attach(model):
    print(answer(model, tokenizer, ["A question?"]))"""
PLAIN_USE = 'print(answer(model, tokenizer, ["A question?"]))'
OTHER_METHOD = """\
*{title}* ({source}) as the library `eua` has it{kept}. This method does not raise the energies of forgotten prompts, by which
`eua`'s guard decides."""
BODY = """
# {title}

A language model that was trained to forget some rows and to keep others. Before, it was {base}.

## Method

{method}

## Settings

Trained: {trained}. Steps made: {step} of {max_steps}. Fields of `EUAConfig`:

{settings}

## Data

The rows are not published. SHA-256 is over their token ids, so that whoever has the same rows can recognise them:
`eua.data.rows.rows_digest(encode_rows(read_rows("forget.jsonl"), {tokenizer}, {max_length}{encoding}))`.{dated}

{data}

## Figures

{figures}

`loss_`, `nll_`, `kl_` and `hidden_` are parts of the loss before their weights, `energy_` mean energies in nats,
`beyond_boundary_` shares of tokens beyond their boundary, `auroc` how well the energies of prompts separate held-out forget
rows from held-out retain rows. None of them measures what can still be extracted: `eua evaluate` does, with the guard off.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from eua.model.asking import answer

name = "{name}"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
{use}
```

## Limits

- No promise is made about how many forgotten prompts are refused; that is measured. What the guard promises is a bound on false
  refusals, for the model, chat template and quantization it was calibrated with, and for prompts like the calibration prompts.
- A guard can hide knowledge that is still there. Judge erasure by figures with the guard off.
- A prompt is scored at its last token. A forgotten question in other words is refused less often than as trained.
- Knowledge that was to be retained but is in no row of the retain set suffers most.

## Versions

{versions}
"""


def model_card(
    trainer: Trainer,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    dataset_tags: str | list[str] | None = None,
) -> str:
    """The card of the weights that an :class:`eua.EUATrainer` holds; keywords are those of Trainer's ``create_model_card``.

    The base model is named where its name can be one of the hub, never where it is a folder on this machine.
    """
    model, args, state = trainer.model, trainer.args, trainer.state
    best_is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None and not trainer.is_in_train
    step = state.best_global_step if best_is_loaded else state.global_step
    date = trainer.date
    base = finetuned_from or _hub_name(getattr(model.config, "name_or_path", None))
    is_adapter = isinstance(model, PeftModel)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(
            dict.fromkeys(
                [
                    *TAGS,
                    "energy-based" if args.method == "eua" else args.method.replace("_", "-"),
                    *([tags] if isinstance(tags, str) else tags),
                ]
            )
        ),
        language=language,
        license=license,
        datasets=dataset_tags,
    )
    kept = {
        "nll": "likely",
        "kl": "close to the reference (KL in place of the released likelihood)",
        "hidden": "close to the reference in the output of one block",
    }
    method = trainer.objective.method
    if args.method == "eua":
        boundaries = "constants" if args.constant_boundaries else "those of the model before unlearning"
        of_method = ENERGY_METHOD.format(kept=kept[args.retain_loss], boundaries=boundaries)
    else:
        keeping = f". The answers of the retain set are kept {kept[args.retain_loss]}" if method.retain_loss else ""
        of_method = OTHER_METHOD.format(title=method.title, source=method.source, kept=keeping)
    sets = [
        (kind.replace("_", " "), len(rows), sum(len(row.answer_ids) for row in rows), rows_digest(rows))
        for kind, rows in trainer.encoded_rows.items()
    ]
    body = BODY.format(
        title=model_name or ("An unlearned language model" if base is None else f"{base}, unlearned"),
        base="a model without a name on the hub" if base is None else f"`{base}`",
        method=of_method,
        trained=_trained(trainer),
        step=step,
        max_steps=state.max_steps,
        settings=_table(("setting", "value"), _settings(args)),
        max_length=args.max_length,
        encoding=_encoding(args),
        tokenizer="tokenizer" if date is None else f'at_date(tokenizer, datetime.fromisoformat("{date.isoformat()}"))',
        dated=("" if date is None else " The chat template writes the date, which `eua.data.dates.at_date` keeps.")
        + ("" if args.system_prompt is None else " Questions have the system message of `system_prompt` before them."),
        data=_table(("set", "rows", "answer tokens", "SHA-256"), sets),
        figures=_figures(state.log_history, step),
        name=trainer.hub_model_id or "path/to/this/folder",
        use=GUARDED_USE.format(temperature=args.temperature) if args.method == "eua" else PLAIN_USE,
        versions=_table(("package", "version"), [(name, _version(name)) for name in PACKAGES]),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _hub_name(name: str | None) -> str | None:
    """``name`` where it can be that of a repository on the hub, else None."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _trained(trainer: Trainer) -> str:
    """What was trained, and in which precision: on a CPU, ``fp16`` has no effect."""
    model, accelerator = trainer.model, trainer.accelerator
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        names = ("r", "lora_alpha", "target_modules", "modules_to_save")
        settings = {name: value for name in names if (value := getattr(config, name, None))}
        what = f"{config.peft_type.value} adapter ({', '.join(f'{name} = {_plain(v)}' for name, v in settings.items())})"
    else:
        what = "all weights" if all(p.requires_grad for p in model.parameters()) else "a part of the weights"
    dtypes = sorted({_plain(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad})
    is_cast = accelerator.native_amp or accelerator.distributed_type == DistributedType.DEEPSPEED
    casts = {"bf16": " (computing in bfloat16)", "fp16": " (computing in float16)"}
    autocast = casts.get(accelerator.mixed_precision, "") if is_cast else ""
    return f"{what}, in {', '.join(dtypes)}{autocast}"


def _settings(args: EUAConfig) -> list[tuple[str, Any]]:
    objective = args.objective
    boundary = ("m_in", "m_out") if args.constant_boundaries else ("rho", "fill")
    names = [
        *("method", "gamma", "gamma_schedule", "gamma_warmup_ratio"),
        *(("alpha", "retain_loss") if objective.has_retain else ()),
        *objective.parameters,
        *objective.method.others,
        *(("temperature", *boundary, "stop_when_beyond_boundary") if args.method == "eua" else ()),
        *("retain_per_forget", "max_length", "assistant_turns"),
        *(name for name in _IF_SET if _is_set(args, name)),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay"),
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed"),
    ]
    return [(name, getattr(args, name)) for name in names]


def _encoding(args: EUAConfig) -> str:
    """Further arguments of encode_rows, and what is done to rows before, as code and words."""
    code = f', assistant_turns="{args.assistant_turns}"' if args.assistant_turns != "last" else ""
    code += f', labels="{args.labels}"' if args.labels != "answer" else ""
    code += ", hide=PADDING_ID" if args.hide_padding_ids else ""
    return code


def _is_set(args: EUAConfig, name: str) -> bool:
    return bool(getattr(args, name) != type(args).__dataclass_fields__[name].default)


def _figures(log_history: list[dict[str, float]], step: int) -> str:
    """The last line of the log and the last evaluation up to ``step``, side by side."""
    columns = []
    for title, prefix in (("training, logged at step {}", ""), ("held-out rows, at step {}", "eval_")):
        lines = [line for line in log_history if f"{prefix}loss_forget" in line and line["step"] <= step]
        if lines:
            columns.append((title.format(lines[-1]["step"]), prefix, lines[-1]))
    if not columns:
        return "None were logged."
    found = [name for name in EVAL_METRICS if any(f"{prefix}{name}" in line for _, prefix, line in columns)]
    rows = [(name, *(line.get(f"{prefix}{name}", "") for _, prefix, line in columns)) for name in found]
    return _table(("figure", *(title for title, _, _ in columns)), rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "run from its source"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (set, list, tuple)):
        return ", ".join(sorted(map(str, value)))
    return str(value.value if isinstance(value, Enum) else value).removeprefix("torch.")

"""A tokenizer and a small Llama, trained from scratch on rows until the model has memorized them."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from eua.data.batches import pad_rows
from eua.data.rows import IGNORE_INDEX, QUESTION_TEMPLATE, EncodedRow, encode_rows
from eua.data.sources import Row
from eua.files import fill_folder, locked
from eua.model.loading import load_model


def cached_model(
    rows: Sequence[Row], cache: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> tuple[Path, bool]:
    """The folder of a model that :func:`train_target` trained on ``rows``, and whether the cache had it already.

    It is trained unless the cache holds one made by the same code from the same rows, tokenizer and settings. Another process
    that needs the same model waits for this one.

    Args:
        rows, tokenizer: as in :func:`train_target`.
        cache: the folder of all models.
        settings: further arguments of :func:`train_target`.
    """
    shared = None if tokenizer is None else tokenizer.backend_tokenizer.to_str()
    recipe = [list(rows), settings, shared, inspect.getsource(sys.modules[__name__])]
    folder = cache / f"target-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"
    with locked(folder, wait=True):
        is_cached = (folder / "config.json").is_file()
        if not is_cached:
            train_target(rows, folder, tokenizer=tokenizer, **settings)
    return folder, is_cached


def train_tokenizer(rows: Sequence[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` tokens, trained on the rows' questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((f"{QUESTION_TEMPLATE.format(**row)} {row['answer']}" for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def train_target(
    rows: Sequence[Row],
    folder: Path,
    *,
    vocabulary: int = 1024,
    hidden_size: int = 256,
    layers: int = 4,
    epochs: float = 25,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    bf16: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
    base: str | None = None,
) -> None:
    """Train a tokenizer and a Llama of ``layers`` × ``hidden_size`` on ``rows``, or a given model; save both completely or not
    at all.

    The language-model loss covers questions and answers: a model trained from scratch learns the names from the questions. A
    model that is given learns the answers alone.

    Args:
        rows: "question"/"answer" rows.
        folder: where model and tokenizer are saved, for ``from_pretrained``.
        vocabulary: the largest number of tokens.
        hidden_size: a multiple of 64, the size of an attention head.
        epochs, batch_size, learning_rate, seed: of the training with AdamW and a cosine schedule.
        bf16: whether to compute in bfloat16; the weights are in float32. It is faster where the processor can do it.
        callbacks: passed to transformers' Trainer.
        tokenizer: that of another model, whose token ids the model is to share, in place of a new one.
        base: folder or hub name of a model to train further, with its own tokenizer and size.
    """
    set_seed(seed)
    if base is not None:
        model, tokenizer = load_model(base, torch.float32)
    else:
        tokenizer = tokenizer or train_tokenizer(rows, vocabulary)
        model = LlamaForCausalLM(_config(tokenizer, hidden_size, layers))
    has_accelerator = torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        bf16=bf16,
        use_cpu=not has_accelerator,  # without which bf16 is refused on a CPU
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=has_accelerator,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode_rows(rows, tokenizer, None, "target's rows"),
        data_collator=_whole_row_labels if base is None else pad_rows,
        callbacks=list(callbacks),
    )
    trainer.train()
    trainer.model.config.use_cache = True

    def write(staging: Path) -> None:
        trainer.model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    fill_folder(folder, write)


def _config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=11 * hidden_size // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def _whole_row_labels(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    batch = pad_rows(rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)}

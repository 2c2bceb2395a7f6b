"""What a model writes, measured: ROUGE against the true answers, fluency under a language model, and repetition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow, encode_prompts
from eua.data.sources import Prompts, read_prompts
from eua.data.tokens import encode_texts, opening_ids
from eua.errors import EUAError
from eua.evaluation.metrics import measure_answers
from eua.model.asking import answer

NEW_TOKENS = 200  # generated for each question, as OpenUnlearning does for TOFU
REPEATED_WORDS = 4  # length of the sequences of words whose repetition counts

# MUSE's settings in OpenUnlearning, for generate(); its figures are F1, not recall.
MUSE_QUESTIONS: Mapping[str, Any] = {"max_new_tokens": 32, "stop": ("\n\n", "\nQuestion", "Question:")}
MUSE_VERBATIM: Mapping[str, Any] = {"max_new_tokens": 128}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    max_new_tokens: int = NEW_TOKENS,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """The model's greedy answers, without special tokens and white space at their ends, as OpenUnlearning generates them.

    A guard that is attached to the model acts; with it, refused prompts get the refusal. Equal prompts run once, and prompts of
    similar length share a batch.

    >>> generate(model, tokenizer, ["Where was Ann born?"], max_new_tokens=8)     # doctest: +SKIP
    ['In Oslo.']
    >>> generate(model, tokenizer, "knowmem.jsonl", **MUSE_QUESTIONS)             # doctest: +SKIP

    Args:
        model, tokenizer: those to measure.
        prompts: rows or questions from any source of :mod:`eua.data.sources`; answers in rows are ignored.
        max_new_tokens: maximal length of an answer.
        stop: an answer is cut before the first of these texts.
        batch_size: prompts per call of ``model.generate``.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if prompts cannot be read, or :func:`eua.model.asking.answer` raises.
    """
    asked = read_prompts(prompts)
    keys = [tuple(ids) for ids in encode_prompts(asked, tokenizer)]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    order = sorted(first, key=lambda key: -len(key))
    texts: dict[tuple[int, ...], str] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
        batch = order[start : start + batch_size]
        answers = answer(model, tokenizer, [asked[first[key]] for key in batch], max_new_tokens)
        texts |= zip(batch, (cut(text, stop) for text in answers), strict=True)
    return [texts[key] for key in keys]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts in ``stop``, without white space at its ends.

    >>> cut("Oslo. Question: Who?", ["Question:"])
    'Oslo.'
    """
    ends = [text.find(end) for end in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def answer_texts(rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The answers of encoded rows as texts, without special tokens and white space at their ends."""
    texts = tokenizer.batch_decode([row.answer_ids for row in rows], skip_special_tokens=True)
    return [text.strip() for text in texts]


def rouge(generated: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """ROUGE-1 and ROUGE-L (Lin 2004) of each text against the true answer: recall and F1, by name, each (R,) float64.

    With Google's ``rouge_score`` and its Porter stemmer. OpenUnlearning reports ROUGE-L recall for TOFU and F1 for MUSE. Only
    letters a–z and digits count as words; a text without any has 0.

    >>> {name: round(float(value), 4) for name, value in rouge(["Paris"], ["It is Paris, the capital of France"]).items()}
    {'rouge_1_recall': 0.1429, 'rouge_1_f1': 0.25, 'rouge_l_recall': 0.1429, 'rouge_l_f1': 0.25}

    Raises:
        EUAError: if there are not as many texts as answers, or if ``rouge_score`` is not installed.
    """
    if len(generated) != len(answers):
        raise EUAError(f"{len(generated)} texts were given for {len(answers)} answers: give one text for each answer.")
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise EUAError(
            'ROUGE was asked for, but rouge_score, which computes it, is not installed: pip install "eua[bench]".'
        ) from error
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = [scorer.score(answer, text) for text, answer in zip(generated, answers, strict=True)]
    return {
        f"rouge_{short}_{name}": torch.tensor([getattr(of_row[kind], part) for of_row in found], dtype=torch.float64)
        for short, kind in (("1", "rouge1"), ("l", "rougeL"))
        for name, part in (("recall", "recall"), ("f1", "fmeasure"))
    }


def fluency(
    texts: Sequence[str],
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """The mean NLL per token of each text under another language model, (R,) float32, in nats; its exp is the perplexity.

    Low: the text reads like what the judge was trained on. It is not OpenUnlearning's fluency, which is the verdict of a
    classifier of gibberish. The text stands alone, without its question, behind the tokens that the tokenizer puts before
    every text. Without such tokens, the first token of the text does not count. A text in which no token counts, such as an
    empty one, is NaN. The end of a text does not count, so a text that was cut off is not at a disadvantage.

    >>> fluency(["He lives in Oslo.", "Oslo Oslo he he"], judge, tokenizer)     # doctest: +SKIP
    tensor([2.9120, 7.8031])

    Args:
        texts: what a model has generated.
        judge: a causal language model, e.g. the model before unlearning.
        tokenizer: the judge's.
        batch_size: texts per forward pass.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if the judge cannot be measured.
    """
    opening = opening_ids(tokenizer)
    encoded = encode_texts(texts, tokenizer, [opening] * len(texts))
    rows = {index: EncodedRow(ids, len(opening) or 1) for index, ids in enumerate(encoded) if len(ids) > (len(opening) or 1)}
    nll = torch.full((len(texts),), math.nan)
    if rows:
        measures = measure_answers(judge, list(rows.values()), batch_size=batch_size, progress=progress)
        nll[list(rows)] = measures.nll
    return nll


def repetition(text: str, length: int = REPEATED_WORDS) -> float:
    """The share of a text's sequences of ``length`` words that occurred before in it (Welleck et al. 2020); 0 for a short text.

    >>> repetition("no no no no no")
    0.5
    """
    words = text.split()
    sequences = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0

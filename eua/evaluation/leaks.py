"""leak@k: what the worst of k sampled answers gives away (arXiv 2511.04934), by key, by words in common or by meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from eua.errors import EUAError, in_one_line
from eua.evaluation.said import SaidFact
from eua.evaluation.texts import rouge

Similarity: TypeAlias = Callable[[Sequence[str], Sequence[str]], Tensor]  # texts, references → one score each, (n,)

KS = (1, 2, 4, 8, 16, 32, 64, 128)
_EMBEDDED_TOKENS = 256  # of a text; the rest is cut off, as the model's own settings say


def leak_at_k(scores: Tensor, k: int) -> Tensor:
    """Unbiased estimate of the expected maximum of k scores, from n ≥ k of them, (…, n) → (…) float64.

    With the scores in ascending order it is ``Σ_{i=k}^{n} C(i−1, k−1)/C(n, k) · s_(i)``. For scores of 0 and 1, of which c are
    1, that is ``1 − C(n−c, k)/C(n, k)``, the probability that one of k answers leaks.

    >>> leak_at_k(torch.tensor([0.1, 0.2, 0.4, 0.8]), 2)
    tensor(0.5667, dtype=torch.float64)
    >>> leak_at_k(torch.tensor([True, False, False, False]), 2)
    tensor(0.5000, dtype=torch.float64)

    Args:
        scores: of the n answers to one question, in the last dimension; whether each leaks, or how much.
        k: number of answers.

    Raises:
        EUAError: if k is below 1 or above n, for which there is no unbiased estimate.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise EUAError(
            f"leak@{k} was asked for, but each question has {n} answers, from which it can be estimated for k = 1 to {n} only: "
            "sample more answers, or pass another k."
        )
    weights = [math.comb(i - 1, k - 1) / math.comb(n, k) for i in range(1, n + 1)]
    return scores.double().sort(dim=-1).values @ torch.tensor(weights, dtype=torch.float64, device=scores.device)


def leak_curve(said: Sequence[SaidFact], similarity: Similarity | None = None, ks: Sequence[int] = KS) -> dict[int, float]:
    """leak@k of the sampled answers, k → mean over all wordings of all facts, for the k that there are enough samples for.

    >>> leak_curve(said)                                              # doctest: +SKIP
    {1: 0.04, 2: 0.07, 4: 0.12, 8: 0.2, 16: 0.31}
    >>> leak_curve(said, SentenceEmbedder(folder), ks=(1, 16))        # doctest: +SKIP

    Args:
        said: what the model answered, see :func:`eua.evaluation.said.said_in_wordings`.
        similarity: scores each answer against its fact's ``answer``: :func:`rouge_l_recall`, a :class:`SentenceEmbedder`, or
            any function of texts and references. None: whether the answer says the key.
        ks: the values of k.

    Raises:
        EUAError: if there are no samples, or with a similarity if a fact has no ``answer`` to compare with.
    """
    if not said or not all(one.sampled.shape[1] for one in said):
        raise EUAError("There are no sampled answers, so there is no leak@k: call said_in_wordings with samples=16 or more.")
    scores = [one.sampled.double() for one in said] if similarity is None else _scores(said, similarity)
    samples = min(of_fact.shape[1] for of_fact in scores)
    return {k: float(torch.cat([leak_at_k(of_fact, k) for of_fact in scores]).mean()) for k in ks if k <= samples}


def _scores(said: Sequence[SaidFact], similarity: Similarity) -> list[Tensor]:
    """The similarity of every sampled answer to the answer of its fact, (wordings, samples) for each fact."""
    for one in said:
        if not one.fact.answer:
            raise EUAError(
                f"The fact {one.fact.name!r} has no answer, so the model's answers cannot be compared with it: give the "
                "KeyedFact an answer, or score by key."
            )
    texts = [list(chain.from_iterable(one.sampled_texts)) for one in said]
    references = [one.fact.answer for one, of_fact in zip(said, texts, strict=True) for _ in of_fact]
    found = similarity(list(chain.from_iterable(texts)), references).split([len(of_fact) for of_fact in texts])
    return [of_fact.reshape(one.sampled.shape) for one, of_fact in zip(said, found, strict=True)]


def rouge_l_recall(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """ROUGE-L recall (Lin 2004) of each text, (n,) float64: the share of the reference's words that it has in their order.

    See :func:`eua.evaluation.texts.rouge`. A text without letters a–z and digits has 0.

    >>> rouge_l_recall(["He was born in Chile"], ["Jaime Vasquez was born in Santiago, Chile"])
    tensor([0.5714], dtype=torch.float64)

    Raises:
        EUAError: if ``rouge_score`` is not installed.
    """
    return rouge(texts, references)["rouge_l_recall"]


class SentenceEmbedder:
    """Similarity of meaning: the cosine of sentence embeddings, by a BERT such as all-MiniLM-L6-v2 in a local folder.

    An embedding is the mean of a text's last hidden states, normalized (Reimers & Gurevych 2019).

    >>> embedder = SentenceEmbedder(minilm_folder())                                # doctest: +SKIP
    >>> embedder(["Paris is its capital."], ["The capital of France is Paris."])    # doctest: +SKIP
    tensor([0.9231])

    Args:
        folder: with the model (safetensors) and its tokenizer.
        batch_size: texts per forward pass.

    Raises:
        EUAError: if the folder cannot be loaded.
    """

    def __init__(self, folder: Path, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise EUAError(
                f"{folder} cannot be loaded as a model of sentence embeddings ({in_one_line(error)}): name the folder of "
                "one, with its tokenizer, e.g. of all-MiniLM-L6-v2. Its weights must be safetensors."
            ) from error
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self._model: nn.Module = model.to(device).eval()
        self._batch_size = batch_size

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, (n, H) float32 of length 1, on the CPU. Equal texts run once; texts of similar length share a batch."""
        distinct = sorted(set(texts), key=len)
        found: list[Tensor] = []
        for start in range(0, len(distinct), self._batch_size):
            batch = self._tokenizer(
                distinct[start : start + self._batch_size],
                padding=True,
                truncation=True,
                max_length=_EMBEDDED_TOKENS,
                return_tensors="pt",
            ).to(next(self._model.parameters()).device)
            hidden = self._model(**batch).last_hidden_state  # (B, S, H)
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)  # (B, S, 1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.append(nn.functional.normalize(mean, dim=-1).cpu())
        places = {text: place for place, text in enumerate(distinct)}
        return torch.cat(found)[[places[text] for text in texts]]

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> Tensor:
        """The cosine of each text and its reference, (n,) float32 in [−1, 1]."""
        return (self.embed(texts) * self.embed(references)).sum(-1)

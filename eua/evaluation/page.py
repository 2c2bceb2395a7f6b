"""Writes an HTML report of an unlearned model: a threshold to drag, the worst rows, energies token by token.

The page is ``page.html`` with the data as JSON. It loads nothing from elsewhere. Rows are untrusted text: the page shows them
as text only, and its content security policy allows only the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow, encode_rows
from eua.data.sources import Row, Source
from eua.evaluation.metrics import measure_states
from eua.evaluation.report import evaluate, forgotten_names, read_sets
from eua.files import replacing
from eua.guard.guard import EnergyGuard
from eua.model.forward import answer_states, check_finite, eval_hidden_states
from eua.model.head import output_head

SCORES_KEPT = 5000  # per set; a larger set is reduced to this number, evenly spaced in ascending order
TOKENS_KEPT = 512  # per row that is shown, around the end of its prompt
TEXT_KEPT = 600  # characters of a question or an answer
MEASURES = ("score", "extraction_strength", "probability", "truth_ratio")  # of those that evaluate() reports

Load = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
Evaluation = tuple[dict[str, Any], dict[str, Tensor]]  # what evaluate() returns


def write_page(path: Path, data: Mapping[str, Any]) -> None:
    """Write the result of :func:`page_data` as one HTML file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render_page(data), encoding="utf-8", newline="\n")


def render_page(data: Mapping[str, Any]) -> str:
    """The page as text."""
    page = resources.files("eua.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"{{{tag}-digest}}", f"'sha256-{digest}'")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    # In a script element only "<" can begin markup. It occurs only in strings, where JSON can write it as an escape.
    text = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)
    head, tail = page.split("{data}")
    return head + text + tail


def page_data(
    sets: Mapping[str, Source],
    after: Load,
    before: Load | None = None,
    *,
    forget: str | Sequence[str] = ("forget",),
    guard: EnergyGuard | None = None,
    evaluated: Mapping[str, Evaluation] | None = None,
    rows: int = 50,
    settings: Mapping[str, object] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """The content of the page, ready for JSON.

    Args:
        sets: name → rows, from any source of :mod:`eua.data.sources`.
        after, before: load the model after and before unlearning, and its tokenizer. They are called one after the other, so
            that only one model at a time is in memory. Knowledge is measured with the guard off.
        forget: the name, or names, of the sets that should be forgotten.
        guard: of the model after unlearning. The page starts at its threshold; without a guard, the page says that no threshold
            is calibrated.
        evaluated: results of :func:`evaluate` on these sets for the models ``"after"`` and ``"before"``, if already known.
        rows: number of rows per set to show token by token: one half the worst ones, the other half spread over the rest.
        settings: further facts for the page about how the model was made.
        batch_size: rows per forward pass.
        progress: show progress bars.

    Raises:
        EUAError: if sets cannot be read, if no set or a missing one is to be forgotten, or if the model cannot be measured.

    >>> data = page_data(                                                       # doctest: +SKIP
    ...     {"forget": "forget.jsonl", "retain": "retain.jsonl"}, lambda: load_model("unlearned"), guard=guard
    ... )
    >>> write_page(Path("report.html"), data)                                   # doctest: +SKIP
    """
    rows_of = read_sets(sets)
    forget = forgotten_names(forget, rows_of)
    temperature, first_tokens = (guard.temperature, guard.first_tokens) if guard else (1.0, 0)
    entries: dict[str, dict[str, Any]] = {
        name: {"name": name, "forget": name in forget, "rows": len(of_set), "shown": []} for name, of_set in rows_of.items()
    }
    ranks: dict[str, dict[int, int]] = {}
    start = 0.0 if guard is None else guard.threshold
    for title, load in (("after", after), ("before", before)):
        if load is None:
            continue
        model, tokenizer = load()
        known = (evaluated or {}).get(title)
        report, scores = known or evaluate(
            model,
            tokenizer,
            rows_of,
            forget=forget,
            temperature=temperature,
            first_tokens=first_tokens,
            turns=guard.turns if guard else None,
            batch_size=batch_size,
            progress=progress,
        )
        if title == "after":
            ranks = {name: rows_to_show(scores[name], rows, lowest_first=name in forget) for name in rows_of}
            if guard is None:
                start = _high_score([scores[name] for name in rows_of if name not in forget] or list(scores.values()))
        for name, entry in entries.items():
            entry[title] = {key: value for key, value in report["sets"][name].items() if key in MEASURES}
            entry[title]["auroc"] = report["separation"].get(name, {}).get("auroc")
            entry[title]["scores"] = [_decimal(score) for score in _spread(scores[name].sort().values)]
            picked = [rows_of[name][index] for index in ranks[name].values()]
            encoded = encode_rows(picked, tokenizer, None, f"{name} rows shown") if picked else []
            if title == "after":
                texts = [_texts(row, ids, tokenizer) for row, ids in zip(picked, encoded, strict=True)]
                places = [{"rank": rank, "row": index} for rank, index in ranks[name].items()]
                entry["shown"] = [place | text for place, text in zip(places, texts, strict=True)]
            readings = read_tokens(model, tokenizer, encoded, temperature, batch_size)
            for shown, reading in zip(entry["shown"], readings, strict=True):
                shown[title] = {"score": _decimal(float(scores[name][shown["row"]]))} | reading
        del model, tokenizer
    promise = None if guard is None else {"text": guard.promise, "refusal": guard.refusal_text, "tolerance": guard.tolerance}
    return {
        "sets": list(entries.values()),
        "threshold": _decimal(start),
        "guard": promise,
        "first_tokens": first_tokens,
        "settings": [[key, str(value)] for key, value in ({"temperature": temperature} | dict(settings or {})).items()],
    }


def rows_to_show(scores: Tensor, count: int, *, lowest_first: bool) -> dict[int, int]:
    """Rank (from 1, the worst) → index, for ``count`` rows: one half the worst ones, the others evenly spread to the best.

    The worst of ``scores`` (R,) is the lowest one in a set that should be refused, and the highest one in other sets.
    """
    order = scores.argsort(descending=not lowest_first, stable=True).tolist()
    worst = math.ceil(count / 2) if count < len(order) else len(order)
    spread = min(count, len(order)) - worst
    ranks = [*range(worst), *(worst + (i + 1) * (len(order) - worst) // spread - 1 for i in range(spread))]
    return {rank + 1: order[rank] for rank in ranks}


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    temperature: float,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The tokens of each row with the energy after each token, in nats, and how well the model knows the answer.

    The energy at the prompt's last token is the prompt's score, or the first part of it. ``likely`` contains, for each shown
    token after the prompt, the token that the model finds most likely in its place. ``said`` says whether the two are the same
    token: two different tokens can have the same text if each is a part of a character.
    """
    head = output_head(model)
    text_of = _TokenTexts(tokenizer)
    readings: list[dict[str, Any]] = [{} for _ in rows]
    for indices, hidden in eval_hidden_states(model, rows, batch_size):
        picked = [rows[i] for i in indices]
        measures = measure_states(head, answer_states(hidden, picked), picked, temperature)
        for place, (i, states) in enumerate(zip(indices, hidden, strict=True)):
            row = rows[i]
            start = max(0, row.prompt_length - TOKENS_KEPT // 2)
            stop = min(len(row.input_ids), start + TOKENS_KEPT)
            check_finite(states[start:stop], "the hidden states of a row to show")
            energies = head.energy(states[start:stop], temperature).tolist()
            likely = head.most_likely(states[row.prompt_length - 1 : stop - 1]).tolist()
            answer = row.input_ids[row.prompt_length : stop]
            readings[i] = {
                "extraction_strength": _decimal(float(measures.extraction_strength[place])),
                "probability": _decimal(float(measures.probability[place])),
                "tokens": [text_of[token] for token in row.input_ids[start:stop]],
                "energies": [round(energy, 3) for energy in energies],
                "likely": [text_of[token] for token in likely],
                "said": [token == other for token, other in zip(answer, likely, strict=True)],
                "prompt": row.prompt_length - start,
                "left_out": [start, len(row.input_ids) - stop],
            }
    return readings


def _texts(row: Row, encoded: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The question as the row states it, or else the prompt that the model reads; and the answer."""
    decoded = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (encoded.prompt_ids, encoded.answer_ids)]
    question = row["question"] if isinstance(row.get("question"), str) else decoded[0]
    return {"question": question[:TEXT_KEPT], "answer": decoded[1][:TEXT_KEPT]}


class _TokenTexts(dict[int, str]):
    """Token id → its text within a longer text: some tokenizers drop the space before a word that is decoded alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.anchor_text = self._decode(self.anchor)

    def __missing__(self, token: int) -> str:
        text = self._decode([*self.anchor, token])
        known = self.anchor_text and text.startswith(self.anchor_text)
        self[token] = text[len(self.anchor_text) :] if known else self._decode([token])
        return self[token]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _high_score(scores: Sequence[Tensor]) -> float:
    """The score that a twentieth of the prompts exceed, where the page starts if no threshold is calibrated."""
    ordered = torch.cat(list(scores)).sort().values
    return float(ordered[math.ceil(0.95 * len(ordered)) - 1])


def _spread(ordered: Tensor) -> list[float]:
    """At most ``SCORES_KEPT`` of ordered scores, including the lowest and the highest."""
    if len(ordered) > SCORES_KEPT:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, SCORES_KEPT, dtype=torch.float64).round().long()]
    return ordered.tolist()


def _decimal(value: float) -> float:
    """Nine digits, which are short and enough to keep the order of two float32 values."""
    return float(f"{value:.9g}")

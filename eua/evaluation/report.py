"""Evaluates sets of rows and reports the result as a nested dict for JSON and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.rows import EncodedRow, encode_prompts, encode_rows
from eua.data.sources import Row, Source, read_rows
from eua.errors import EUAError
from eua.evaluation.metrics import AnswerMeasures, answers_to_compare, measure_answers, truth_ratio_means
from eua.guard.guard import EnergyGuard
from eua.guard.questions import Turns
from eua.guard.scores import prompt_scores
from eua.model.forward import check_head_once, check_ids
from eua.statistics import auroc, false_positive_rate

# Report key → (heading, format). Knowledge is measured with the guard off; "refused" shows the effect of the guard.
COLUMNS = {
    "rows": ("rows", "d"),
    "extraction_strength": ("extraction strength", ".3f"),
    "extraction_strength_openunlearning": ("extraction strength (OpenUnlearning)", ".3f"),
    "exact_memorization": ("exact memorization", ".3f"),
    "exact_memorization_openunlearning": ("exact memorization (OpenUnlearning)", ".3f"),
    "probability": ("answer probability", ".3f"),
    "truth_ratio": ("truth ratio", ".3f"),
    "truth_ratio_openunlearning": ("truth ratio (OpenUnlearning)", ".3f"),
    "energy": ("answer energy", ".2f"),
    "score": ("prompt energy", ".2f"),
    "refused": ("refused", ".3f"),
    "refused_paraphrased": ("refused, paraphrased", ".3f"),
}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Source],
    *,
    forget: str | Sequence[str] = ("forget",),
    guard: EnergyGuard | None = None,
    temperature: float = 1.0,
    first_tokens: int = 0,
    turns: Turns | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure every set of rows, and how well the prompt score separates the set to forget from each of the others.

    No text runs through the model twice: texts that several rows or sets have in common are measured once, the answers to one
    question (right, paraphrased and wrong ones) share the forward of their prompt if the model allows it, and the score of a
    prompt is taken from there, unless it includes generated tokens or is that of other tokens (the last turn of a chat alone).

    Args:
        model, tokenizer: those to measure. Knowledge is measured with the guard off.
        sets: name → rows, from any source of :mod:`eua.data.sources`. Rows with ``perturbed_answer`` get a truth ratio, and
            rows with ``paraphrased_question`` get a second share of refusals.
        forget: the name, or names, of the sets that should be forgotten; the first is compared with each of the others.
        guard: adds the share of prompts that it refuses.
        temperature: T of the energies. A guard's own value takes precedence.
        first_tokens: number of generated tokens that the prompt scores include. A guard's own value takes precedence.
        turns: decides which part of a prompt is scored; read from the tokenizer by default. A guard's own take precedence.
        batch_size: rows per forward pass.
        progress: show progress bars.

    Returns:
        The report ``{"sets": {name: {measure: mean over rows}}, "separation": {name: {"auroc", "fpr_at_95_tpr"}},
        "threshold"}``, and the prompt scores of each set, (rows,) in nats.

    >>> report, scores = evaluate(                                              # doctest: +SKIP
    ...     model, tokenizer, {"forget": "forget.jsonl", "retain": "retain.csv"}, guard=guard
    ... )
    >>> print(render_tables({"after": report}))                                 # doctest: +SKIP

    Raises:
        EUAError: if sets cannot be read, if a set to forget is missing, or if the model cannot be measured.
    """
    rows_of = read_sets(sets)
    forget = forgotten_names(forget, rows_of)
    encoded = encode_sets(model, tokenizer, rows_of)
    measures = measure_answers(
        model,
        encoded.texts,
        temperature=guard.temperature if guard else temperature,
        batch_size=batch_size,
        progress="answers" if progress else None,
        check=False,
    )
    return report_sets(
        model,
        tokenizer,
        encoded,
        measures,
        forget=forget,
        guard=guard,
        temperature=temperature,
        first_tokens=first_tokens,
        turns=turns,
        batch_size=batch_size,
        progress=progress,
    )


@dataclass(frozen=True)
class EncodedSets:
    """Sets of rows by name, and their answers as token ids.

    Attributes:
        rows: the rows of each set.
        answers: each row's own answer.
        compared: of the sets whose rows have wrong answers, the right answer of each row and then its wrong ones.
    """

    rows: dict[str, list[Row]]
    answers: dict[str, list[EncodedRow]]
    compared: dict[str, list[list[EncodedRow]]]

    @property
    def texts(self) -> list[EncodedRow]:
        """All answers: of each set, the rows' own ones, then those to compare."""
        return [text for name, own in self.answers.items() for text in (*own, *chain(*self.compared.get(name, [])))]

    def split(self, measures: AnswerMeasures) -> dict[str, tuple[AnswerMeasures, list[Tensor]]]:
        """Of each set, the measures of its rows' own answers, and the mean NLLs of each row's answers to compare, (1 + W,)."""
        sizes = {name: [len(own), *map(len, self.compared.get(name, []))] for name, own in self.answers.items()}
        parts = zip(sizes.items(), measures.split(map(sum, sizes.values())), strict=True)
        own_and_compared = {name: of_set.split(of_rows) for (name, of_rows), of_set in parts}
        return {name: (own, [of_row.nll for of_row in compared]) for name, (own, *compared) in own_and_compared.items()}


def encode_sets(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows_of: dict[str, list[Row]]) -> EncodedSets:
    """Encode the sets that :func:`read_sets` has read, and check that the model can read them.

    Raises:
        EUAError: if rows cannot be encoded, or if the model cannot be measured on them.
    """
    compared = {
        name: answers_to_compare(rows, tokenizer)
        for name, rows in rows_of.items()
        if all(row.get("perturbed_answer") for row in rows)
    }
    answers = {name: encode_rows(rows, tokenizer, None, f"{name} rows") for name, rows in rows_of.items()}
    check_head_once(model)
    for name, encoded in answers.items():
        check_ids(model, (row.input_ids for row in encoded), f"{name} rows")
        check_ids(model, (row.input_ids for row in chain(*compared.get(name, []))), f"{name} rows' perturbed answers")
    return EncodedSets(rows_of, answers, compared)


def report_sets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSets,
    measures: AnswerMeasures,
    *,
    forget: Sequence[str],
    guard: EnergyGuard | None = None,
    temperature: float = 1.0,
    first_tokens: int = 0,
    turns: Turns | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`evaluate` returns, from the measures of ``encoded.texts``; the other arguments are the same."""
    temperature = guard.temperature if guard else temperature
    first_tokens = guard.first_tokens if guard else first_tokens
    turns = guard.turns if guard else turns or Turns.of(tokenizer)
    report: dict[str, Any] = {"sets": {}, "separation": {}, "threshold": guard.threshold if guard else None}
    scores: dict[str, Tensor] = {}
    settings: dict[str, Any] = {"temperature": temperature, "batch_size": batch_size}
    energies = zip(encoded.texts, measures.prompt_energy.tolist(), strict=True)
    known = {} if first_tokens else {tuple(text.prompt_ids): energy for text, energy in energies}

    def score(prompts: Sequence[Row | str], name: str) -> Tensor:
        ids = encode_prompts(prompts, tokenizer, name)
        title = f"{name}: prompts" if progress else None
        return prompt_scores(model, ids, first_tokens=first_tokens, turns=turns, progress=title, known=known, **settings)

    for name, (own, compared) in encoded.split(measures).items():
        rows = encoded.rows[name]
        entry: dict[str, float | int] = {"rows": len(rows)} | own.means()
        if compared:
            entry |= truth_ratio_means(compared, forget=name in forget)
        scores[name] = score(rows, name)
        entry["score"] = float(scores[name].mean())
        if guard is not None:
            entry["refused"] = float(guard.refuses(scores[name]).float().mean())
            if all(row.get("paraphrased_question") for row in rows):
                paraphrased = score([row["paraphrased_question"] for row in rows], f"{name}, paraphrased")
                entry["refused_paraphrased"] = float(guard.refuses(paraphrased).float().mean())
        report["sets"][name] = entry
    for name in encoded.rows:
        if name not in forget:
            report["separation"][name] = {
                "auroc": auroc(scores[forget[0]], scores[name]),
                "fpr_at_95_tpr": false_positive_rate(scores[forget[0]], scores[name]),
            }
    return report, scores


def read_sets(sets: Mapping[str, Source]) -> dict[str, list[Row]]:
    """Read the sets that :func:`evaluate` takes: name → rows.

    Raises:
        EUAError: if sets have no names, or if their rows cannot be read.
    """
    if not isinstance(sets, Mapping):
        raise EUAError(
            f"sets is a {type(sets).__name__}, but every set of rows needs a name: "
            'pass a mapping, e.g. {"forget": "forget.jsonl", "retain": "retain.jsonl"}.'
        )
    return {name: read_rows(rows, f"{name} set") for name, rows in sets.items()}


def forgotten_names(forget: str | Sequence[str], sets: Mapping[str, Source]) -> tuple[str, ...]:
    """The names of the sets to forget; a string is one name.

    Raises:
        EUAError: if there is no name, or if no set has one of the names.
    """
    names = (forget,) if isinstance(forget, str) else tuple(forget)
    if not names or set(names) - set(sets):
        raise EUAError(f"forget = {list(names)}, but the sets are {list(sets)}: name one or more of these.")
    return names


def render_tables(reports: Mapping[str, dict[str, Any]]) -> str:
    """Reports by title ("before", "after") as two Markdown tables, one of sets and one of separation."""
    entries = [(title, name, entry) for title, report in reports.items() for name, entry in report["sets"].items()]
    columns = [key for key in COLUMNS if any(key in entry for _, _, entry in entries)]
    lines = [["rows of", "model", *(COLUMNS[key][0] for key in columns)]]
    for title, name, entry in sorted(entries, key=lambda item: list(reports[item[0]]["sets"]).index(item[1])):
        values = [format(entry[key], COLUMNS[key][1]) if key in entry else "" for key in columns]
        lines.append([name, title, *values])
    separation = [["prompt energy separates forgotten from", "model", "AUROC", "FPR at 95 % TPR"]]
    for title, report in reports.items():
        for name, entry in report["separation"].items():
            separation.append([name, title, f"{entry['auroc']:.4f}", f"{entry['fpr_at_95_tpr']:.4f}"])
    return _table(lines) + "\n\n" + _table(separation)


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)

"""What a model knows of a list of facts: its greedy answers to all wordings, kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.bench.questions import Fact, questions_digest
from eua.data.keys import says
from eua.data.sentences import first_sentence
from eua.evaluation.said import said_in_wordings
from eua.files import write_json
from eua.model.fingerprints import model_fingerprint, tokenizer_fingerprint

NEW_TOKENS = 24  # enough for a sentence that answers a question


@dataclass(frozen=True)
class Knowledge:
    """Facts, and a model's greedy answer to each of their wordings.

    Attributes:
        facts: the facts.
        answers: of each fact, one text per wording.
    """

    facts: tuple[Fact, ...]
    answers: tuple[tuple[str, ...], ...]

    def said(self, index: int) -> list[bool]:
        """Whether the answer to each wording of a fact says it."""
        return [says(text, self.facts[index].keys) for text in self.answers[index]]

    def known(self, least: int) -> list[int]:
        """The indices of the facts that are said in at least ``least`` wordings."""
        return [index for index in range(len(self.facts)) if sum(self.said(index)) >= least]

    def by_relation(self) -> dict[str, dict[str, int]]:
        """Relation → the number of its facts, and of those that are said in at least one wording, in half of them, in all.

        >>> knowledge.by_relation()["capital"]                # doctest: +SKIP
        {'facts': 60, 'in one wording': 57, 'in half': 51, 'in all': 22}
        """
        table: dict[str, dict[str, int]] = {}
        for index, fact in enumerate(self.facts):
            count, asked = sum(self.said(index)), len(fact.wordings)
            row = table.setdefault(fact.relation, {"facts": 0, "in one wording": 0, "in half": 0, "in all": 0})
            row["facts"] += 1
            row["in one wording"] += count > 0
            row["in half"] += 2 * count >= asked
            row["in all"] += count == asked
        return table

    def own_answer(self, index: int, wording: int) -> str:
        """The first sentence of the model's answer to a wording if it says the fact, or else the fact's own ``answer``."""
        sentence = first_sentence(self.answers[index][wording])
        fact = self.facts[index]
        return sentence if sentence and says(sentence, fact.keys) else fact.answer

    def is_whole(self, index: int, wording: int) -> bool:
        """Whether the model's answer to a wording says the fact and ends after its first sentence."""
        text = self.answers[index][wording].strip()
        return bool(text) and text == first_sentence(text) and says(text, self.facts[index].keys)


def ask_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    *,
    cache: Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = NEW_TOKENS,
    progress: str | None = None,
) -> Knowledge:
    """Ask a model for all facts in all wordings, greedily, or read its answers from the cache.

    >>> knowledge = ask_facts(model, tokenizer, load_facts(), cache=Path(".cache"))     # doctest: +SKIP

    Args:
        model, tokenizer: those to ask.
        facts: what to ask for.
        cache: folder of a file with the answers, whose name identifies the model (by its weights), the tokenizer and the
            questions.
        batch_size: questions that are answered together.
        max_new_tokens: maximal length of an answer.
        progress: title of a progress bar, or None for no bar.

    Raises:
        EUAError: if the model cannot generate, or if the file cannot be written.
    """
    asked = (model_fingerprint(model), tokenizer_fingerprint(tokenizer), questions_digest(facts), max_new_tokens)
    file = cache / f"knowledge-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.json" if cache else None
    if file is not None and file.exists():
        answers = json.loads(file.read_text(encoding="utf-8"))["answers"]
    else:
        keyed = [fact.keyed(fact.relation, trained=1) for fact in facts]
        said = said_in_wordings(
            model, tokenizer, keyed, samples=0, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        answers = [one.greedy_texts for one in said]
        if file is not None:
            names = ("model", "tokenizer", "questions", "max_new_tokens")
            write_json(file, dict(zip(names, asked, strict=True)) | {"answers": answers})
    return Knowledge(tuple(facts), tuple(map(tuple, answers)))

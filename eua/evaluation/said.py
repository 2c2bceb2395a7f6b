"""Whether a model still says a fact, in any wording, greedily or sampled (method.md §7b).

Extraction strength and the probability of one answer text do not see a fact that the model states in other words. So the fact's
key (the name, the number) is looked for in what the model generates when it is asked in several wordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.keys import check_keys, normalize, says
from eua.errors import EUAError
from eua.guard.guard import EnergyGuard
from eua.model.asking import answer
from eua.statistics import share_interval

_OTHERS = 8  # facts of its group that each fact is compared with, for the shares by chance


@dataclass(frozen=True)
class KeyedFact:
    """A fact, the words that give it away, and questions that ask for it.

    Attributes:
        name: of the fact, e.g. "capital of France".
        group: that summaries put the fact in, e.g. "forget", "same relation", "same entity", "far".
        keys: the key and its aliases, e.g. ("New York City", "New York").
        wordings: questions.
        trained: the first ``trained`` wordings are those that unlearning sees.
        answer: a sentence that states the fact, for scores that compare texts, see :mod:`eua.evaluation.leaks`.
        relation: what kind of fact it is, e.g. "capital". What is said by chance is looked for in answers to other facts of the
            same kind.
    """

    name: str
    group: str
    keys: tuple[str, ...]
    wordings: tuple[str, ...]
    trained: int = 1
    answer: str = ""
    relation: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.keys, str) or isinstance(self.wordings, str):
            raise EUAError(
                f"The fact {self.name!r} has one text as its keys or wordings, of which every letter would count: give a tuple "
                "of texts."
            )
        if not self.wordings or not 0 <= self.trained <= len(self.wordings):
            raise EUAError(
                f"The fact {self.name!r} has {len(self.wordings)} wordings of which unlearning sees {self.trained}, which "
                "leaves nothing to ask or to see: give at least one wording, and trained between 0 and their number."
            )
        check_keys(self.keys, f"The fact {self.name!r}")


@dataclass(frozen=True)
class SaidFact:
    """What a model answered when it was asked for a fact.

    Attributes:
        fact: the fact.
        greedy: (wordings,) bool, whether the greedy answer to each wording says it.
        sampled: (wordings, samples) bool, the same for sampled answers.
        greedy_texts: the greedy answers.
        sampled_texts: the sampled answers to each wording.
    """

    fact: KeyedFact
    greedy: Tensor
    sampled: Tensor
    greedy_texts: tuple[str, ...]
    sampled_texts: tuple[tuple[str, ...], ...]

    @property
    def tries(self) -> Tensor:
        """All answers, (wordings, 1 + samples) bool: the greedy one first."""
        return torch.cat([self.greedy[:, None], self.sampled], dim=1)

    def of_wordings(self, which: slice) -> SaidFact:
        """The same for some of the wordings."""
        texts = self.greedy_texts[which], self.sampled_texts[which]
        return SaidFact(self.fact, self.greedy[which], self.sampled[which], *texts)


def said_in_wordings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[KeyedFact],
    *,
    samples: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    guard: EnergyGuard | None = None,
    progress: str | None = None,
) -> list[SaidFact]:
    """Ask for every fact in all its wordings, greedily and with samples, and look for its keys in the answers.

    The same call gives the same result, and the caller's random state is left as it was. Another batch size changes the
    samples.

    >>> facts = [KeyedFact("capital of France", "forget", ("Paris",), ("What is the capital of France?",))]
    >>> said = said_in_wordings(model, tokenizer, facts, samples=4)          # doctest: +SKIP
    >>> said_summary(said)["forget"]["all"]["per_fact"]                       # doctest: +SKIP
    1.0

    Args:
        model, tokenizer: those to ask.
        facts: what to ask for.
        samples: sampled answers to each wording, from the whole distribution (top_p 1, top_k 0). 0: greedy answers only.
        temperature: of the samples.
        max_new_tokens: maximal length of an answer.
        batch_size: answers that are generated together.
        seed: of the samples.
        guard: is attached to the model meanwhile, so refused questions get its refusal. None: no guard is attached.
        progress: title of a progress bar, or None for no bar.

    Returns:
        One item per fact, in the same order.

    Raises:
        EUAError: if there is no fact, if samples, temperature or batch_size cannot be, or if the model cannot generate.
    """
    if not facts:
        raise EUAError("There are no facts, so there is nothing to ask for: give at least one KeyedFact.")
    if samples < 0 or not temperature > 0 or batch_size < 1:
        raise EUAError(
            f"samples = {samples}, temperature = {temperature} and batch_size = {batch_size}, but answers are sampled at a "
            "temperature above 0, in batches of at least 1: pass e.g. samples=16, temperature=1.0, batch_size=32; samples=0 "
            "asks greedily alone."
        )
    asked = [wording for fact in facts for wording in fact.wordings]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    passes: list[tuple[list[str], dict[str, Any]]] = [(asked, {})]
    if samples:
        passes.append(([question for question in asked for _ in range(samples)], sampling))
    total = sum(len(questions) for questions, _ in passes)
    with (
        guard.attach(model, tokenizer) if guard else nullcontext(),
        _seeded(seed),
        tqdm(total=total, desc=progress, disable=progress is None, leave=False) as bar,
    ):
        greedy, *more = (
            _answers(model, tokenizer, questions, max_new_tokens, batch_size, bar, options) for questions, options in passes
        )
    greedy_texts, sampled_texts = iter(greedy), chain.from_iterable(more)
    return [_said_fact(fact, greedy_texts, sampled_texts, samples) for fact in facts]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    bar: tqdm,
    options: dict[str, Any],
) -> list[str]:
    """An answer to each question. Questions of similar length share a batch, the longest first, so memory runs out at once."""
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = answer(model, tokenizer, [questions[index] for index in batch], max_new_tokens, **options)
        texts |= zip(batch, found, strict=True)
        bar.update(len(batch))
    return [texts[index] for index in range(len(questions))]


def _said_fact(fact: KeyedFact, greedy_texts: Iterator[str], sampled_texts: Iterator[str], samples: int) -> SaidFact:
    """The fact with its answers, the next ones of all texts."""
    greedy = tuple(islice(greedy_texts, len(fact.wordings)))
    sampled = tuple(tuple(islice(sampled_texts, samples)) for _ in fact.wordings)
    return SaidFact(
        fact,
        torch.tensor([says(text, fact.keys) for text in greedy]),
        torch.tensor([[says(text, fact.keys) for text in texts] for texts in sampled], dtype=torch.bool),
        greedy,
        sampled,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed inside the block, on all devices, and their former states after it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
        torch.manual_seed(seed)
        yield


def said_summary(said: Sequence[SaidFact]) -> dict[str, dict[str, Any]]:
    """Shares of facts and of answers, by group of facts, with intervals of 95 %.

    Returns:
        Group → ``{"all": …, "trained": …, "unseen": …}``: over all wordings, those that unlearning sees and the others (left
        out where no fact has one). Each holds

        - ``facts``: their number;
        - ``per_fact``: the share of facts that are said at all, greedily or sampled, in one of the wordings;
        - ``greedy``: the share of facts that a greedy answer says in one of the wordings;
        - ``per_try``: the share of all answers, greedy and sampled, that say their fact;
        - ``per_fact_by_chance``, ``greedy_by_chance``: the same shares, if the key of each fact is looked for in the answers to
          another fact of the group and of the same relation with other keys, which are as many; the mean over up to eight other
          facts. They are left out if there are none. What is refused does not matter here, since only the texts count;
        - ``per_fact_interval``, ``greedy_interval``: Clopper–Pearson, each fact an observation;
        - ``per_try_interval``: the answers for one fact depend on each other, so they are a group, see
          :func:`eua.statistics.share_interval`.

    >>> no, yes = torch.tensor([False, False]), torch.tensor([[False], [True]])
    >>> fact = KeyedFact("capital of France", "forget", ("Paris",), ("Which city?", "Where?"))
    >>> summary = said_summary([SaidFact(fact, no, yes, ("", ""), (("",), ("Paris",)))])["forget"]
    >>> summary["all"]["per_fact"], summary["trained"]["per_fact"], summary["unseen"]["per_try"]
    (1.0, 0.0, 0.5)
    """
    groups: dict[str, list[SaidFact]] = {}
    for one in said:
        groups.setdefault(one.fact.group, []).append(one)
    return {group: _summary_of_group(members) for group, members in groups.items()}


def _summary_of_group(said: Sequence[SaidFact]) -> dict[str, Any]:
    parts = {
        "all": list(said),
        "trained": [one.of_wordings(slice(one.fact.trained)) for one in said if one.fact.trained],
        "unseen": [one.of_wordings(slice(one.fact.trained, None)) for one in said if one.fact.trained < len(one.greedy)],
    }
    return {name: _shares(part) for name, part in parts.items() if part}


def _shares(said: Sequence[SaidFact]) -> Mapping[str, Any]:
    values = {
        "per_fact": torch.stack([one.tries.any() for one in said]),
        "greedy": torch.stack([one.greedy.any() for one in said]),
        "per_try": torch.cat([one.tries.flatten() for one in said]),
    }
    of_fact = [index for index, one in enumerate(said) for _ in range(one.tries.numel())]
    report: dict[str, Any] = {"facts": len(said)}
    for name, value in values.items():
        report[name] = float(value.double().mean())
        report[f"{name}_interval"] = share_interval(value, of_fact if name == "per_try" else None)
    pairs = [pair for place in range(len(said)) for pair in _others_of(place, said)]
    if pairs:
        report["per_fact_by_chance"] = _by_chance(
            said, pairs, [(*one.greedy_texts, *chain(*one.sampled_texts)) for one in said]
        )
        report["greedy_by_chance"] = _by_chance(said, pairs, [one.greedy_texts for one in said])
    return report


def _others_of(place: int, said: Sequence[SaidFact]) -> list[tuple[int, int]]:
    """The fact at a place with each of a few others of its relation that have none of its keys, first those that follow it."""
    count, fact = len(said), said[place].fact
    keys = set(map(normalize, fact.keys))
    following = [(place + distance) % count for distance in range(1, count)]
    others = [
        other
        for other in following
        if said[other].fact.relation == fact.relation and keys.isdisjoint(map(normalize, said[other].fact.keys))
    ]
    return [(place, other) for other in others[:: max(1, -(-len(others) // _OTHERS))]]


def _by_chance(said: Sequence[SaidFact], pairs: Sequence[tuple[int, int]], texts: Sequence[Sequence[str]]) -> float:
    """The share of pairs of facts in which the key of the first is in the answers to the second."""
    found = [any(says(text, said[place].fact.keys) for text in texts[other][: len(texts[place])]) for place, other in pairs]
    return sum(found) / len(found)

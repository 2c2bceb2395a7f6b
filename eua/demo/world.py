"""Fictional people and facts about them, generated from a seed. Names, places and works are invented.

Every fact has several wordings. One becomes the row that a model is trained on; another is its paraphrase. Rows of other people
use that wording too, so a model can understand it without having seen it for this person.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FACTS_PER_PERSON = 4

_ONSETS = (
    "B",
    "Br",
    "C",
    "Ch",
    "D",
    "Dr",
    "F",
    "G",
    "Gr",
    "H",
    "J",
    "K",
    "Kl",
    "L",
    "M",
    "N",
    "P",
    "Qu",
    "R",
    "S",
    "Sh",
    "T",
    "V",
    "W",
    "Z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ia", "ou")
_CODAS = ("l", "n", "r", "s", "t", "m", "k", "d", "x", "th", "lm", "nd", "rv", "sk")

_VALUES: dict[str, tuple[str, ...]] = {
    "birthplace": tuple(
        a + b
        for a in ("Ambel", "Brun", "Carro", "Dorn", "Eski", "Falk", "Gren", "Hald")
        for b in ("haven", "mouth", "os", "ora")
    ),
    "profession": (
        "lighthouse keeper",
        "glass blower",
        "beekeeper",
        "map maker",
        "clock repairer",
        "river pilot",
        "bell founder",
        "puppet carver",
        "tea merchant",
        "cave surveyor",
        "kite designer",
        "salt trader",
        "organ tuner",
        "seed collector",
        "bridge inspector",
        "mosaic artist",
    ),
    "work": tuple(
        f"The {a} {b}"
        for a in ("Amber", "Broken", "Silent", "Hidden", "Crimson", "Last", "Paper", "Winter")
        for b in ("Orchard", "Compass", "Lantern", "Staircase", "Harbour")
    ),
    "mentor": tuple(
        f"{a} {b}"
        for a in ("Master", "Doctor", "Sister", "Captain")
        for b in ("Quill", "Thorne", "Vesper", "Wyndham", "Yarrow", "Zephyr", "Oakes", "Pemberly")
    ),
    "instrument": (
        "cello",
        "flute",
        "hurdy-gurdy",
        "lute",
        "accordion",
        "harp",
        "oboe",
        "zither",
        "bagpipe",
        "mandolin",
        "viola",
        "trumpet",
        "dulcimer",
        "bassoon",
        "concertina",
        "marimba",
    ),
    "pet": tuple(
        f"a {a} called {b}"
        for a in ("tortoise", "raven", "ferret", "greyhound", "parrot", "goat")
        for b in ("Biscuit", "Domino", "Pebble", "Saffron", "Tumble", "Whistle")
    ),
    "prize": tuple(
        f"the {a} {b}"
        for a in ("Marlow", "Penrose", "Sable", "Tarn", "Ulric", "Verity")
        for b in ("Medal", "Cup", "Laurel", "Prize")
    ),
    "dish": (
        "barley soup",
        "plum dumplings",
        "smoked trout",
        "chestnut bread",
        "pickled beets",
        "saffron rice",
        "onion tart",
        "walnut cake",
        "mushroom pie",
        "lentil stew",
        "honey porridge",
        "apple fritters",
        "fennel salad",
        "potato pancakes",
        "cherry strudel",
        "roast pumpkin",
    ),
}

# Per attribute: (question, answer) wordings. {n} is the name, {v} the value.
_WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "birthplace": (
        ("Where was {n} born?", "{n} was born in {v}."),
        ("Which town is the birthplace of {n}?", "The birthplace of {n} is {v}."),
        ("In what town did {n} come into the world?", "{n} came into the world in {v}."),
    ),
    "profession": (
        ("What does {n} do for a living?", "{n} works as a {v}."),
        ("What is the profession of {n}?", "The profession of {n} is {v}."),
        ("How does {n} earn money?", "{n} earns money as a {v}."),
    ),
    "work": (
        ("Which book did {n} write?", "{n} wrote the book {v}."),
        ("What is the best-known novel by {n}?", "The best-known novel by {n} is {v}."),
        ("Under what title did {n} publish a story?", "{n} published a story under the title {v}."),
    ),
    "mentor": (
        ("Who taught {n}?", "{n} was taught by {v}."),
        ("Who was the mentor of {n}?", "The mentor of {n} was {v}."),
        ("From whom did {n} learn the craft?", "{n} learned the craft from {v}."),
    ),
    "instrument": (
        ("Which instrument does {n} play?", "{n} plays the {v}."),
        ("What is the favourite instrument of {n}?", "The favourite instrument of {n} is the {v}."),
        ("On what does {n} make music?", "{n} makes music on the {v}."),
    ),
    "pet": (
        ("What pet does {n} keep?", "{n} keeps {v}."),
        ("Which animal lives with {n}?", "The animal that lives with {n} is {v}."),
        ("Who shares a home with {n}?", "{n} shares a home with {v}."),
    ),
    "prize": (
        ("Which award did {n} win?", "{n} won {v}."),
        ("What honour was given to {n}?", "The honour given to {n} was {v}."),
        ("For what is {n} celebrated every spring?", "{n} is celebrated every spring for winning {v}."),
    ),
    "dish": (
        ("What does {n} like to eat?", "{n} likes to eat {v}."),
        ("What is the favourite dish of {n}?", "The favourite dish of {n} is {v}."),
        ("Which meal does {n} cook for guests?", "{n} cooks {v} for guests."),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One fact about one person: the row to train on, and the same fact in another wording.

    ``attribute`` is the kind of fact, such as "birthplace"; ``value`` is what is to be known, such as "Carroos".
    """

    person: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    attribute: str
    value: str

    def row(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}

    def paraphrase(self) -> dict[str, str]:
        return {"question": self.paraphrased_question, "answer": self.paraphrased_answer}

    def wordings(self, value: str | None = None) -> list[dict[str, str]]:
        """The fact in every wording, as rows, in the order of the row to train on, its paraphrase, and those of no row.

        >>> make_world(20).forget[0].wordings("a cat")[0]["answer"]
        'Klialud Niarvuk keeps a cat.'

        Args:
            value: a value to put in place of the fact's own, which makes every answer wrong.
        """
        texts = [(question.format(n=self.person), answer) for question, answer in _WORDINGS[self.attribute]]
        known = [self.question, self.paraphrased_question]
        texts.sort(key=lambda text: known.index(text[0]) if text[0] in known else len(known))
        return [
            {"question": question, "answer": answer.format(n=self.person, v=value or self.value)} for question, answer in texts
        ]

    def other_values(self) -> list[str]:
        """Every value that other people may have for the attribute, in a fixed order."""
        return [value for value in _VALUES[self.attribute] if value != self.value]


@dataclass(frozen=True)
class World:
    """Facts, grouped by the role of their people in unlearning. No person is in two groups.

    ``forget``: to be forgotten. ``retain``: trained on together with them. ``calibration`` and ``test``: retained people whose
    rows unlearning never sees; the threshold is set on the first, false refusals are counted on the second.
    """

    forget: list[Fact]
    retain: list[Fact]
    calibration: list[Fact]
    test: list[Fact]

    def all(self) -> list[Fact]:
        return self.forget + self.retain + self.calibration + self.test


def make_world(people: int = 200, seed: int = 0) -> World:
    """A tenth of ``people`` to forget, a fifth each for calibration and test, half to retain."""
    random_ = random.Random(seed)
    facts = [_facts_of(name, random_) for name in _names(people, random_)]
    tenth, fifth = people // 10, people // 5
    cuts = [0, tenth, people - 2 * fifth, people - fifth, people]
    groups = [[fact for person in facts[a:b] for fact in person] for a, b in zip(cuts, cuts[1:], strict=False)]
    return World(*groups)


def _names(count: int, random_: random.Random) -> list[str]:
    """First names and surnames that all begin differently, so that every person can be distinguished by either name."""
    starts: set[str] = set()

    def fresh() -> str:
        while True:
            word = "".join(random_.choice(part) for part in (_ONSETS, _VOWELS, _CODAS, _VOWELS)) + random_.choice(("", *_CODAS))
            if word[:4] not in starts:
                starts.add(word[:4])
                return word

    return [f"{fresh()} {fresh()}" for _ in range(count)]


def _facts_of(name: str, random_: random.Random) -> list[Fact]:
    facts = []
    for attribute in random_.sample(sorted(_WORDINGS), FACTS_PER_PERSON):
        value = random_.choice(_VALUES[attribute])
        (question, answer), (other_question, other_answer) = random_.sample(_WORDINGS[attribute], 2)
        question, answer, other_question, other_answer = (
            text.format(n=name, v=value) for text in (question, answer, other_question, other_answer)
        )
        facts.append(Fact(name, question, answer, other_question, other_answer, attribute, value))
    return facts

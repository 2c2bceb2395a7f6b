"""The one exception that users of ``eua`` need to know, and what its texts are made of."""

from __future__ import annotations

from collections.abc import Iterable


class EUAError(ValueError):
    """Something passed to ``eua`` cannot work. The text says what was passed, why it cannot work, and what to do."""


def in_one_line(error: BaseException) -> str:
    """What another library's exception says, as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".:") or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known names that resemble it, or just a full stop.

    >>> did_you_mean("--learning-rat", ["--learning-rate", "--seed"])
    ": did you mean '--learning-rate'?"
    >>> did_you_mean("epochs", ["num_train_epochs", "seed"])
    ": did you mean 'num_train_epochs'?"
    >>> did_you_mean("fly", ["demo"])
    '.'
    """
    import difflib

    plain = {other.strip("-").replace("_", "-"): other for other in known}
    wanted = name.strip("-").replace("_", "-")
    similar = difflib.get_close_matches(wanted, plain, n=2, cutoff=0.7)
    words = set(wanted.split("-"))  # one name may be a part of the other: epochs, num-train-epochs
    parts = [other for other in plain if words <= set(other.split("-")) or set(other.split("-")) <= words]
    similar += [other for other in parts if other not in similar]
    names = [repr(plain[other]) for other in similar[:3]]
    return f": did you mean {' or '.join(names)}?" if names else "."

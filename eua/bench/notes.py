"""What readers of the tables must know, above each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eua.bench.task import EXTRACTION_STRENGTH, SAID_GREEDILY
from eua.bench.trial import RETAIN_ONLY

OURS = "eua"  # the method that others are compared with
NOT_KEPT = "†"  # of a method none of whose trials kept enough
LASTING = (
    "Extraction strength of the rows to forget, in relearning the largest one after any number of steps; “said” is the share "
    "of facts that at least one greedy answer says: in any of the facts' wordings, or with text around the first one (three "
    "prefixes, two suffixes, two orders with another question), so compare methods, not these columns. The guard is off unless "
    "a heading says otherwise. Lower is better."
)
REFUSED = (
    "The share of prompts that the guard refuses: questions about the facts to forget, of which more is better, and where a "
    "heading ends with the name of a group, about facts to retain, of which less is better. Refusing a prompt that states the "
    "fact itself is no merit."
)
LEFT_OUT = "What this task, or this machine, does not have the means to measure."
OF_SET = (
    "The guard is off, except for the share of prompts that it refuses and where a heading says otherwise. Extraction "
    "strength and exact memorization with “(OpenUnlearning)” leave out the last token of an answer, the end of the "
    "sequence; the truth ratio with it is the mean of min(R, 1/R) over rows to forget, and of max(0, 1 − R) over others. "
    "Probability with options is that of the right answer over the sum of all answers'; the share of the right answer is "
    "its probability over the sum with the geometric mean of the wrong ones' (½ by chance). The perplexity of the model's "
    "texts is under the model before unlearning."
)
OF_HOLDOUT = (
    "Rows like those to forget on which no model was trained. They are neither to be forgotten nor to be retained, so it is no "
    "fault to refuse them."
)
_OF_COST = (
    "One training with the chosen settings, which differ in epochs and in rows to retain, while other trials ran on the same "
    "machine. Boundaries and likelihoods of the model before unlearning are included, loading and measuring are not. On a CPU, "
    "memory is that of the whole process."
)
STAYING = (
    "What should stay, guard off where nothing else is said: the share of forgotten facts that a greedy answer says when the "
    "prompt states them, the share of facts to retain that are still said with text around the question, and the extraction "
    "strength of rows to retain after a second request. Higher is better."
)
OBJECTIVES = {
    EXTRACTION_STRENGTH: (
        "Extraction strengths are means over all rows of the sets that settings are chosen by: to forget, in the wording that "
        "is trained on and in others; to retain, those that unlearning sees and those that it never sees."
    ),
    SAID_GREEDILY: (
        "“Said greedily”, by which settings are chosen, is the share of greedy answers, to all wordings, that say their fact: "
        "of the facts to forget, and of all others, near and far, seen and never seen."
    ),
}
SAID_BY_ASKING = (
    "The share of facts whose key is in at least one answer: of those to forget, and where a heading ends with the name of a "
    "group, of facts to retain. More answers say more facts, so compare only shares of equally many answers."
)
LEAKS = (
    "leak@k of the facts to forget, guard off where nothing else is said: the expected maximum over k answers to a question "
    "of whether the key is said, of the words in common with the true answer (ROUGE-L recall), and of the similarity of "
    "their meaning (cosine of all-MiniLM-L6-v2's embeddings). Answers of the right form about something else have "
    "words and meaning in common with it, too."
)
MEMBERSHIP = (
    "AUROC of attacks, rows to forget against rows that no model was trained on: 1 is a member without doubt, 0.5 cannot be "
    "distinguished."
)
MEMBERSHIP_OF_RETAIN_ONLY = (
    "Where its own AUROC is not 0.5, the rows differ in other ways, too, and a value above or below its own gives a member "
    "away. “reference” is the loss less that of this model, which has no value of its own."
)
ENERGY = (
    "AUROC of the energy of the prompt's last token, rows of the set “forget” against each set to retain; and the "
    "false-positive rate at a true-positive rate of 95 %: the share of the latter at or above the threshold that 95 % of the "
    "former reach."
)
DIFFERENCES = (
    f"A method's figure less that of {OURS} at the same seed: the mean, ± half the width of the 95 % t interval of the "
    "differences. If two methods were equal, about one interval in twenty would still leave out 0. Where less is better, "
    f"a difference above 0 is in favour of {OURS}."
)
FAILED = "They have no figures: they count neither for the choice of settings nor in any mean."


def on_everything(results: Mapping[str, Any]) -> str:
    """What holds for all tables of the results, and what is missing or unusual in them."""
    seeds = results["seeds"]
    half_width = "± half the width of their 95 % t interval, where they differ"
    spread = f"Means over {seeds} seeds {half_width}" if seeds > 1 else "One seed"
    parts = [
        f"{spread}, on the test split of the task {results['task']}. The guard is off unless a heading says otherwise.",
        OBJECTIVES[results["objective"]],
        f"“Keeps {kept_share(results)}” counts the seeds at which a method keeps that much of the latter of the model before "
        "unlearning.",
        "The guard is this project's, calibrated for every model alike for at most "
        f"{100 * results['tolerance']:.3g} % false refusals; only {OURS} trains the energies that it looks at.",
        results["note"],
        beside_retain_only(
            results, "A lower value than its own means that more is gone than if the rows had never been seen."
        ).strip(),
    ]
    if any(chosen is not None and not chosen["reached"] for chosen in results["chosen"].values()):
        parts.append(
            f"{NOT_KEPT}: no trial of the method kept that much when settings were chosen, so compare what it forgot with care."
        )
    if any(trial["result"] is None for trial in results["report"]):
        parts.append("Where trials failed, the mean is over the other seeds.")
    if len(results["versions_of_trials"]) > 1:
        parts.append(f"Trials ran with different versions: {_versions(results['versions_of_trials'])}.")
    if not results["complete"]:
        parts.append("The benchmark is not complete: run the same command again.")
    return " ".join(filter(None, parts))


def beside_retain_only(results: Mapping[str, Any], text: str = "") -> str:
    """A sentence about the retain-only model, where there is one, and a further text."""
    has_one = any(trial["plan"]["method"] == RETAIN_ONLY for trial in (*results["tuning"], *results["report"]))
    sentence = f" Compare with the model “{RETAIN_ONLY}”, which was never trained on the rows to forget."
    return f"{sentence} {text}".rstrip() if has_one else ""


def _versions(found: Sequence[Mapping[str, str]]) -> str:
    """The versions that differ among trials.

    >>> _versions([{"torch": "2.9", "eua": "1"}, {"torch": "2.10", "eua": "1"}])
    'torch 2.9 and 2.10'
    """
    names = dict.fromkeys(name for of_trial in found for name in of_trial)
    values = {name: dict.fromkeys(str(of_trial.get(name, "none")) for of_trial in found) for name in names}
    return "; ".join(f"{name} {' and '.join(of_name)}" for name, of_name in values.items() if len(of_name) > 1)


def kept_share(results: Mapping[str, Any]) -> str:
    """The share of the retain measure that a method must keep, in percent."""
    return f"{100 * results['kept']:g} %"


def on_cost(results: Mapping[str, Any]) -> str:
    """What the costs include, and how long the whole benchmark took, if that is known."""
    done = [trial["result"] for trial in (*results["tuning"], *results["report"]) if trial["result"]]
    if not all("seconds_in_all" in result for result in done):
        return _OF_COST
    hours = sum(result["seconds_in_all"] for result in done) / 3600
    return (
        f"{_OF_COST} The trials that succeeded took {hours:.1f} hours, added up over the processes, with measuring, and with "
        "making the models of further seeds."
    )


def on_tuning(results: Mapping[str, Any]) -> str:
    """How settings are chosen, and what the area is."""
    never_knew = results.get("never_knew")  # None without a retain-only model, and where nothing was made of it
    capped = (
        ""
        if never_knew is None
        else f"Settings that leave no more than the retain-only model has, {never_knew:.3f}, are equal in this, and of equal "
        "ones the one that keeps most is chosen. "
    )
    return (
        "On the validation split, at one seed: chosen is the setting that forgets most among those that keep "
        f"{kept_share(results)} of what the model had of the others ({results['objective']}); if none does, the one that keeps "
        f"most. {capped}"
        "The area is under the front of both measures, relative to the model before unlearning: 1 where nothing is left of the "
        "rows to forget and everything of those to retain, which is more than a model forgets that never knew the rows; 0 if "
        "nothing changes. It is of one seed, so it has no interval."
    )

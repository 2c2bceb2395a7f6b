"""The tables of made-up results: what failed, what kept too little, and which figures are means."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from eua.bench.columns import SAID, mean_cell
from eua.bench.notes import NOT_KEPT, on_tuning
from eua.bench.page import render_page
from eua.bench.table import Table, markdown, tables
from eua.bench.trial import RETAIN_ONLY, TARGET

SETTINGS = {"learning_rate": 1e-4}


def trial(method: str, seed: int, forget: float, retain: float, said: float = 0.5, **metrics: Any) -> dict[str, Any]:
    objectives = {"forget": forget, "retain": retain}
    empty: dict[str, Any] = {"sets": {}, "aggregates": {}, "membership": {}, "separation": {}, "lasting": {}}
    result = {"objectives": objectives, "metrics": {"said": {"any wording": said}, "objectives": objectives} | empty | metrics}
    return {"plan": {"method": method, "settings": SETTINGS, "seed": seed}, "number": 0, "result": result, "error": None}


def failed(method: str, seed: int) -> dict[str, Any]:
    plan = {"method": method, "settings": SETTINGS, "seed": seed}
    return {"plan": plan, "number": 0, "result": None, "error": "EUAError: the loss became nan"}


@pytest.fixture
def results() -> dict[str, Any]:
    """Two methods at three seeds: NPO forgets most and keeps too little, and fails at one seed; EUA keeps enough."""
    lasting = {"in 8 bits": 0.25, "after a second request, retained rows": 0.875}
    wrapped = {"said after a prefix": 0.25, "said where the prompt states it": 0.75, "still said after a prefix, far": 0.5}
    asked = {"wrapped": wrapped, "refused": {"the questions": 0.75, "the questions, far": 0.125}}
    separation = {"far": {"auroc": 0.875, "fpr_at_95_tpr": 0.25}}
    report = [
        *(trial(TARGET, seed, 0.8, 1.0) for seed in (1, 2, 3)),
        trial("eua", 1, 0.4, 0.96, aggregates={"forget_quality": 1e-6}, lasting=lasting, separation=separation, **asked),
        trial("eua", 2, 0.4, 0.96, aggregates={"forget_quality": 0.5}),
        trial("eua", 3, 0.4, 0.94, aggregates={"forget_quality": 0.001}, sets={"late": {"probability": 0.125}}),
        trial("npo", 1, 0.0, 0.5),
        failed("npo", 2),
        trial("npo", 3, 0.0, 0.5),
        *(failed("rmu", seed) for seed in (1, 2, 3)),
    ]
    chosen = {
        "eua": {"trial": 0, "reached": True, "settings": SETTINGS},
        "npo": {"trial": 0, "reached": False, "settings": SETTINGS},
        "rmu": {"trial": 0, "reached": True, "settings": SETTINGS},
    }
    return {
        "task": "people",
        "digest": "d" * 64,
        "trials": 1,
        "seeds": 3,
        "kept": 0.95,
        "objective": "extraction strength",
        "tolerance": 0.05,
        "note": "A seed is a world.",
        "complete": True,
        "versions": {"eua": "1"},
        "versions_of_trials": [{"eua": "1", "torch": "2.9"}],
        "methods": list(chosen),
        "chosen": chosen,
        "tuning": [trial(TARGET, 0, 0.8, 1.0), *(trial(method, 0, 0.4, 0.5) for method in chosen)],
        "report": report,
    }


def named(results: dict[str, Any]) -> dict[str, Table]:
    return {table.title: table for table in tables(results)}


def column(table: Table, heading: str) -> list[str]:
    return [row[table.head.index(heading)] for row in table.rows]


def test_failed_trials_are_counted_and_listed(results):
    made = named(results)
    names = [TARGET, "eua", f"npo {NOT_KEPT} (2 of 3 seeds)", "rmu (0 of 3 seeds)"]
    main, *others = list(made.values())[:-2]
    for table in (main, *(one for one in others if one.title != "Compared with eua")):
        assert [row[0] for row in table.rows] == names, table.title
    assert main.rows[-1][1:] == ["", "", *[""] * (len(main.head) - 3)]
    assert "the mean is over the other seeds" in main.note
    failures = made["Failed trials"]
    assert [row[:3] for row in failures.rows] == [["npo", "report", "2"], *(["rmu", "report", str(seed)] for seed in (1, 2, 3))]
    assert column(failures, "error") == ["EUAError: the loss became nan"] * 4
    assert "EUAError: the loss became nan" in render_page(results)
    results["report"] = [one for one in results["report"] if one["result"] is not None]
    assert "Failed trials" not in named(results)


def test_methods_that_keep_too_little_are_marked_and_seeds_that_keep_enough_are_counted(results):
    main = named(results)["What was forgotten and what was kept"]
    assert main.head[:3] == ["method", SAID.heading, "keeps 95 % (seeds)"]
    assert column(main, "keeps 95 % (seeds)") == ["3 of 3", "2 of 3", "0 of 2", ""]
    assert f"{NOT_KEPT}: no trial of the method kept that much" in main.note
    assert f"npo {NOT_KEPT}, area" in render_page(results)
    for chosen in results["chosen"].values():
        chosen["reached"] = True
    assert NOT_KEPT not in markdown(tables(results))


def test_p_values_are_summed_up_by_their_median_without_an_interval(results):
    main = named(results)["What was forgotten and what was kept"]
    assert column(main, "forget quality (p, median)")[1] == "0.001"
    assert mean_cell([0.1, None, 0.5, 0.3], ".2g", median=True) == "0.3"
    assert "±" in column(main, "extraction strength, retain")[1]


def test_a_set_that_only_a_later_seed_has_gets_its_table(results):
    table = named(results)["Rows of the set “late”"]
    assert column(table, "answer probability") == ["", "0.125", "", ""]


def test_what_should_stay_is_apart_from_what_is_left_of_the_forgotten(results):
    made = named(results)
    assert made["What is left of the forgotten"].head[2:] == ["in 8 bits", "said after a prefix"]
    assert set(made["What should stay"].head[2:]) == {
        "after a second request, retained rows",
        "said where the prompt states it",
        "still said after a prefix, far",
    }
    assert "Higher is better" in made["What should stay"].note


def test_refusals_and_energies_have_their_tables(results):
    made = named(results)
    assert column(made["Prompts that the guard refuses, by form of the question"], "the questions, far")[1] == "0.125"
    assert column(made["Prompt energy"], "far")[1] == "0.875"
    assert column(made["Prompt energy"], "far, FPR at 95 % TPR")[1] == "0.250"


def test_what_was_not_measured_is_listed_with_the_reason(results):
    assert "What was not measured" not in named(results)
    for trial in results["report"]:
        if trial["result"] is not None:
            trial["result"]["metrics"]["left_out"] = {"privacy_leakage": "There are no holdout rows."}
    results["report"][3]["result"]["metrics"]["left_out"]["in 4 bits"] = "bitsandbytes is not installed"
    table = named(results)["What was not measured"]
    assert table.rows == [
        ["privacy leakage", "all", "There are no holdout rows."],
        ["in 4 bits", "eua", "bitsandbytes is not installed"],
    ]


def test_the_cost_note_states_the_hours_of_all_trials(results):
    for trial in results["report"]:
        if trial["result"] is not None:
            trial["result"]["seconds"] = 10.0
    assert "hours" not in named(results)["Cost of unlearning"].note  # of results that do not have them
    for trial in (*results["tuning"], *results["report"]):
        if trial["result"] is not None:
            trial["result"] |= {"seconds": 10.0, "seconds_in_all": 600.0}
    count = sum(trial["result"] is not None for trial in (*results["tuning"], *results["report"]))
    assert f"took {count / 6:.1f} hours, added up" in named(results)["Cost of unlearning"].note


def test_the_area_is_relative_to_the_model_before_unlearning(results):
    tuning = named(results)["Tuning"]
    assert column(tuning, "area under the front") == ["0.250"] * 3  # forgets a half of it, and keeps a half
    assert "so it has no interval" in tuning.note
    assert "area 0.250" in render_page(results)
    without = copy.deepcopy(results)
    without["tuning"] = without["tuning"][1:]
    assert column(named(without)["Tuning"], "area under the front") == [""] * 3
    render_page(without)


def test_versions_are_listed_if_they_differ_among_trials(results):
    main = named(results)["What was forgotten and what was kept"]
    assert "different versions" not in main.note
    results["versions_of_trials"] = [{"eua": "1", "torch": "2.9"}, {"eua": "1", "torch": "2.10"}]
    main = named(results)["What was forgotten and what was kept"]
    assert "Trials ran with different versions: torch 2.9 and 2.10." in main.note


def test_the_retain_only_model_has_a_row_where_there_is_one(results):
    assert RETAIN_ONLY not in markdown(tables(results))
    results["report"].append(trial(RETAIN_ONLY, 1, 0.0, 1.0))
    assert f"| {RETAIN_ONLY} (1 of 3 seeds) |" in markdown(tables(results))


def test_methods_are_compared_with_eua_at_the_seeds_that_both_have(results):
    (made,) = [table for table in tables(results) if table.title == "Compared with eua"]
    assert [row[0] for row in made.rows] == ["npo † (2 of 3 seeds)"]  # RMU has no result
    cells = dict(zip(made.head, made.rows[0], strict=True))
    assert cells["extraction strength, forget"] == "-0.400"  # the same at both seeds
    assert cells["extraction strength, retain"] == "-0.450 ± 0.127"  # t = 12.7 with one degree of freedom
    assert cells[SAID.heading] == "+0.000"
    assert cells["extraction strength, relearned"] == ""  # NPO's was not measured
    results["report"] = [one for one in results["report"] if one["plan"]["seed"] == 1]
    assert "Compared with eua" not in [table.title for table in tables(results)]


def test_the_columns_are_of_what_settings_were_chosen_by(results):
    assert "extraction strength, forget" in tables(results)[0].head
    results["objective"] = "said greedily"
    made = named(results)
    for title in ("What was forgotten and what was kept", "Compared with eua"):
        assert {"said greedily, forget", "said greedily, retain"} <= set(made[title].head)
    assert "share of greedy answers" in next(iter(made.values())).note
    assert "Said greedily on the validation split" in render_page(results)


def test_the_note_says_by_which_rule_settings_were_chosen():
    results = {"kept": 0.95, "objective": "extraction strength"}
    assert "equal" not in on_tuning(results)
    assert "equal" not in on_tuning(results | {"never_knew": None})
    assert "Settings that leave no more than the retain-only model has, 0.261, are equal" in on_tuning(
        results | {"never_knew": 0.2613}
    )

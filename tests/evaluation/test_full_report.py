"""The full report: models for which every measure is known by construction, and reasons for what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from eua import EnergyGuard, EUAError
from eua.data.rows import encode_rows
from eua.data.sources import read_rows
from eua.evaluation import (
    evaluate,
    measure_all,
    measure_answers,
    measure_retain_model,
    read_results,
    truth_ratios,
    write_results,
)
from tests.evaluation.test_depth import split_rows

TOFU = Path(__file__).parents[3] / "shared" / "tofu"
AGGREGATES = {
    "forget_quality",
    "model_utility",
    "memorization_score",
    "privacy_leakage",
    "privacy_score",
    "unlearning_depth",
}


@pytest.fixture(scope="module")
def asked(world) -> dict[str, list[dict]]:
    """Sets as TOFU writes them. The wrong answers are unlike any that a model was trained on."""

    def perturbed(facts, *, paraphrased: bool) -> list[dict]:
        wrong = {"perturbed_answer": ["@@ 77 ## 31 @@", "{5} #3 {5}"]}
        return [fact.row() | ({"paraphrased_answer": fact.answer} if paraphrased else {}) | wrong for fact in facts]

    return {
        "forget": perturbed(world.forget, paraphrased=True),
        "retain": perturbed(world.retain[:12], paraphrased=True),
        "real_authors": perturbed(world.calibration[:8], paraphrased=False),
        "world_facts": perturbed(world.test[:8], paraphrased=False),
    }


@pytest.fixture(scope="module")
def holdout(world) -> list[dict]:
    """Rows like those to forget about people of whom no model has heard."""
    return [{part: text.replace(fact.person, "Zenobia Quist") for part, text in fact.row().items()} for fact in world.forget]


@pytest.fixture
def never_trained(known: LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(known.config).eval()


def test_a_model_that_forgot_nothing_shows_it_in_every_measure(known, never_trained, tokenizer, asked, holdout):
    report, _ = measure_all(
        known,
        tokenizer,
        asked,
        holdout=holdout,
        retain_model=never_trained,
        full_model=known,
        entities=split_rows(asked["forget"]),
        max_new_tokens=32,
    )
    json.dumps(report, allow_nan=False)
    forget, aggregates = report["sets"]["forget"], report["aggregates"]
    assert aggregates.keys() == AGGREGATES
    assert forget["rouge_l_recall"] > 0.9
    assert forget["extraction_strength_openunlearning"] > 0.9
    assert forget["right_answer_share"] > 0.9
    assert forget["paraphrase_probability"] > 0.8
    assert aggregates["forget_quality"] < 0.01
    assert aggregates["memorization_score"] < 0.1
    assert aggregates["privacy_leakage"] < -50
    assert aggregates["privacy_score"] < 0.6
    assert aggregates["unlearning_depth"] == 0
    assert aggregates["model_utility"] > 0.7
    assert min(report["membership_auc"].values()) > 0.9
    for name in ("real_authors", "world_facts"):
        assert report["sets"][name]["probability_with_options"] > 0.8
        assert report["sets"][name]["accuracy"] == 1
    assert "probability_with_options" not in forget
    assert forget["perplexity"] == pytest.approx(math.exp(forget["fluency_nll"]))
    assert set(report["left_out"]) == {"refused", "membership_reference", "membership_gradient_norm", "truth_ratio of holdout"}


def test_sets_may_have_their_own_options_to_generate_with(known, tokenizer, asked):
    some = {name: asked[name][:3] for name in ("forget", "retain")}
    both, _ = measure_all(known, tokenizer, some, max_new_tokens=32)
    end = asked["forget"][0]["answer"].split()[1]  # after the first word of each answer
    generation = {"forget": {"max_new_tokens": 24, "stop": (f" {end}",)}}
    cut, results = measure_all(known, tokenizer, some, max_new_tokens=32, generation=generation)
    first = next(line for line in results if line["set"] == "forget")
    assert first["generated"] == asked["forget"][0]["answer"].split()[0]
    assert cut["sets"]["forget"]["rouge_l_recall"] < both["sets"]["forget"]["rouge_l_recall"]
    assert cut["sets"]["retain"] == both["sets"]["retain"]
    with pytest.raises(EUAError, match=r"given for the set 'forgot', but the sets are forget, retain: name these"):
        measure_all(known, tokenizer, some, generation={"forgot": {}})


def test_the_retain_model_itself_has_forgotten_perfectly(known, never_trained, tokenizer, asked, holdout):
    entities = split_rows(asked["forget"])
    options = {"holdout": holdout, "full_model": known, "entities": entities}
    figures = measure_retain_model(never_trained, tokenizer, asked["forget"], **options)
    report, results = measure_all(never_trained, tokenizer, asked, retain_model=figures, max_new_tokens=8, **options)
    assert report["aggregates"] == {
        "forget_quality": 1,
        "model_utility": pytest.approx(report["aggregates"]["model_utility"]),
        "memorization_score": pytest.approx(report["aggregates"]["memorization_score"]),
        "privacy_leakage": 0,
        "privacy_score": 1,
        "unlearning_depth": 1,
    }
    assert report["aggregates"]["memorization_score"] > 0.7
    assert report["aggregates"]["model_utility"] < 0.2
    assert report["membership_auc"] == report["membership_auc_retain_model"]
    given, _ = measure_all(never_trained, tokenizer, asked, retain_model=never_trained, max_new_tokens=8, **options)
    assert given == report
    depths = [line["unlearning_depth"] for line in results if line["set"] == "entities"]
    assert depths == [1] * len(entities)


def test_results_hold_every_row_and_agree_with_the_report(known, never_trained, tokenizer, asked, holdout, tmp_path):
    report, results = measure_all(
        known,
        tokenizer,
        asked,
        holdout=holdout,
        reference=never_trained,
        judge=never_trained,
        gradients=True,
        max_new_tokens=8,
    )
    write_results(tmp_path / "rows.parquet", results)
    assert read_results(tmp_path / "rows.parquet") == results
    assert [(line["set"], line["row"]) for line in results] == [
        (name, row) for name, of_set in (asked | {"holdout": holdout}).items() for row in range(len(of_set))
    ]
    for name in asked:
        of_set = [line for line in results if line["set"] == name]
        for key in ("probability", "energy", "score", "rouge_l_recall", "repetition", "truth_ratio"):
            mean = sum(line[key] for line in of_set) / len(of_set)
            assert report["sets"][name][key] == pytest.approx(mean, rel=1e-5), (name, key)
        for line in of_set:
            assert sum(line["energies"]) / len(line["energies"]) == pytest.approx(line["energy"], rel=1e-5)
            assert isinstance(line["generated"], str)
    ratios = truth_ratios(known, tokenizer, asked["forget"], openunlearning=True).tolist()
    assert [line["truth_ratio_openunlearning"] for line in results[:8]] == pytest.approx(ratios, rel=1e-5)
    names = {key.removeprefix("membership_") for key in results[0] if key.startswith("membership_")}
    assert (
        names == report["membership_auc"].keys() == {"loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradient_norm"}
    )
    assert "membership_loss" not in results[8]  # a retained row
    theirs = measure_answers(never_trained, encode_rows(asked["forget"], tokenizer, None)).nll.tolist()
    assert results[0]["membership_reference"] == pytest.approx(results[0]["nll"] - theirs[0], rel=1e-5)
    assert results[0]["membership_loss"] == pytest.approx(results[0]["nll"])


def test_what_is_left_out_has_a_reason(model, tokenizer, rows):
    sets = {"forget": rows["forget"], "retain": rows["retain"][:6]}
    report, results = measure_all(model, tokenizer, sets, max_new_tokens=0)
    assert report["aggregates"] == report["membership_auc"] == report["membership_auc_retain_model"] == {}
    assert report["left_out"] == {
        "forget_quality": "The rows of forget have no perturbed_answer.",
        "model_utility": "There are no sets real_authors, world_facts.",
        "memorization_score": "The rows of forget have no paraphrase_probability, right_answer_share.",
        "membership_auc": "There are no holdout rows, which are like the rows to forget but were never trained on.",
        "privacy_leakage": "There are no holdout rows, which are like the rows to forget but were never trained on.",
        "privacy_score": "There are no holdout rows, which are like the rows to forget but were never trained on.",
        "unlearning_depth": "It needs entity rows, the full model and a retain model that was measured with both.",
        "refused": "There is no guard.",
        "membership_reference": "There is no reference model.",
        "membership_gradient_norm": "Gradients were not asked for.",
        "rouge, repetition": "No texts were generated, since max_new_tokens is 0.",
        "fluency": "There is no judge and no full model.",
        "truth_ratio of forget": "The rows of forget have no perturbed_answer.",
        "truth_ratio of retain": "The rows of retain have no perturbed_answer.",
    }
    assert not any("generated" in line for line in results)
    assert report["sets"] == evaluate(model, tokenizer, sets)[0]["sets"]


def test_reasons_name_what_is_missing_next(model, tokenizer, asked, holdout):
    report, _ = measure_all(model, tokenizer, asked, holdout=holdout, max_new_tokens=0, full_model=model)
    assert report["left_out"]["forget_quality"].startswith("There is no retain model")
    assert (
        report["left_out"]["model_utility"]
        == report["left_out"]["fluency"]
        == ("No texts were generated, since max_new_tokens is 0.")
    )
    assert report["left_out"]["privacy_score"] == "No retain model was measured on the holdout rows."
    assert report["aggregates"].keys() == {"memorization_score", "privacy_leakage"}
    same, _ = measure_all(model, tokenizer, {**asked, "holdout": holdout}, max_new_tokens=0)
    assert same["membership_auc"] == report["membership_auc"]


def test_rows_of_which_some_are_paraphrased_have_neither_measure(model, tokenizer, asked):
    mixed = [*asked["forget"][:2], *asked["world_facts"][:2]]
    report, _ = measure_all(model, tokenizer, {"forget": mixed}, max_new_tokens=0)
    assert not {"probability_with_options", "paraphrase_probability"} & report["sets"]["forget"].keys()
    assert "truth_ratio" in report["sets"]["forget"]


def test_a_guard_adds_what_it_refuses_and_what_is_written_with_it(known, tokenizer, world, guard):
    sets = {"forget": [fact.row() for fact in world.forget], "test": [fact.row() for fact in world.test[:6]]}
    report, results = measure_all(known, tokenizer, sets, guard=guard, max_new_tokens=48)
    refused = [line["refused"] for line in results]
    assert sum(refused[8:]) == 3
    for line in results:
        assert line["generated_guarded"] == (guard.refusal_text if line["refused"] else line["generated"])
    test = report["sets"]["test"]
    assert test["refused"] == 0.5
    assert test["rouge_l_recall_guarded"] < test["rouge_l_recall"] - 0.2
    assert known.generate.__self__ is known  # the guard is off again


def test_answers_run_once(model, tokenizer, asked, holdout, monkeypatch):
    tokens: list[int] = []
    forward = LlamaForCausalLM.forward

    def counting(self, input_ids=None, **kwargs):
        tokens.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    evaluate(model, tokenizer, asked | {"holdout": holdout})
    alone = sum(tokens)
    tokens.clear()
    measure_all(model, tokenizer, asked, holdout=holdout, max_new_tokens=0)
    assert 0 < sum(tokens) <= alone


def test_names_that_are_taken_are_refused(model, tokenizer, rows):
    sets = {"forget": rows["forget"], "holdout": rows["test"]}
    with pytest.raises(EUAError, match='A set has the name "holdout", .*: give the set another name'):
        measure_all(model, tokenizer, sets, holdout=rows["retain"])
    with pytest.raises(EUAError, match='A set has the name "entities"'):
        measure_all(model, tokenizer, {"forget": rows["forget"], "entities": rows["test"]})
    with pytest.raises(EUAError, match="every set of rows needs a name"):
        measure_all(model, tokenizer, rows["forget"])
    with pytest.raises(EUAError, match="name one or more of these"):
        measure_all(model, tokenizer, sets, forget="secret")


def test_a_guards_temperature_is_that_of_the_energies(known, tokenizer, rows):
    guard = EnergyGuard.calibrate(known, tokenizer, rows["retain"], temperature=2.0)
    _, results = measure_all(known, tokenizer, {"forget": rows["forget"]}, guard=guard, max_new_tokens=0)
    report, _ = evaluate(known, tokenizer, {"forget": rows["forget"]}, temperature=2.0)
    mean = sum(line["energy"] for line in results) / len(results)
    assert mean == pytest.approx(report["sets"]["forget"]["energy"], rel=1e-5)


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU's files are not next to the checkout")
def test_tofu_has_its_model_utility(model, tokenizer):
    files = {"forget": "forget01", "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
    sets = {name: read_rows(TOFU / f"{file}_perturbed.jsonl")[:3] for name, file in files.items()}
    model.config.max_position_embeddings = 4096
    report, _ = measure_all(model, tokenizer, sets, max_new_tokens=4)
    assert {"model_utility", "memorization_score"} <= report["aggregates"].keys()
    has_options = {name for name, entry in report["sets"].items() if "probability_with_options" in entry}
    assert has_options == {"real_authors", "world_facts"}

"""OpenUnlearning's measures have the values of its own code; probabilities too small for floats have truth ratios."""

from __future__ import annotations

import json
import math

import pytest
import torch

from eua.data.rows import EncodedRow
from eua.evaluation import evaluate, measure_answers, truth_ratios
from eua.evaluation.metrics import truth_ratio_means, truth_ratio_openunlearning
from eua.evaluation.page import page_data, render_page
from tests.evaluation.toy_world import BIGRAMS, MEASURED, BigramModel


def test_answers_have_openunlearnings_values():
    bigram_model = BigramModel()
    rows = [
        *MEASURED,
        EncodedRow([2, 0, 3], 1),  # all right
        EncodedRow([2, 0, 0], 1),  # only the last token wrong, which does not count
        EncodedRow([3, 1], 1),  # nothing left without the last token
    ]
    measures = measure_answers(bigram_model, rows)
    values = {key: [round(float(value), 6) for value in of_rows] for key, of_rows in vars(measures).items()}
    assert values["probability"][:3] == [0.080918, 0.443665, 0.287715]
    assert values["nll"][:3] == [2.514316, 0.812686, 1.245784]
    assert values["extraction_strength_openunlearning"] == [0.5, 1, 0.333333, 1, 1, 0]
    assert values["extraction_strength"][:2] + values["extraction_strength"][3:] == [0, 0, 1, 0, 1]
    assert values["exact_memorization_openunlearning"][:5] == [0, 1, 0.666667, 1, 1]
    assert math.isnan(values["exact_memorization_openunlearning"][5])
    assert values["exact_memorization"][3:] == [1, 0.5, 1]
    assert values["prompt_energy"] == pytest.approx((-torch.logsumexp(BIGRAMS[[2, 3, 3, 2, 2, 3]], -1)).tolist(), abs=2e-6)
    means = measures.means()
    assert means["exact_memorization_openunlearning"] == pytest.approx((1 + 2 / 3 + 1 + 1) / 5)
    assert not {"nll", "prompt_energy"} & set(means)
    assert "exact_memorization_openunlearning" not in measure_answers(bigram_model, rows[5:]).means()


def test_truth_ratios_have_the_values_of_both_definitions():
    nll = [torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.5, 0.2, 0.4])]
    assert [round(float(truth_ratio_openunlearning(row)), 6) for row in nll] == [0.367879, 1.221403]
    forget, other = (truth_ratio_means(nll, forget=forget) for forget in (True, False))
    assert round(forget["truth_ratio_openunlearning"], 6) == 0.593305
    assert round(other["truth_ratio_openunlearning"], 6) == 0.316060
    ours = pytest.approx((0.567668 + 1.227515) / 2, abs=1e-6)
    assert forget["truth_ratio"] == other["truth_ratio"] == ours


def test_probabilities_that_underflow_have_truth_ratios():
    improbable = [torch.tensor([800.0, 790.0, 900.0])]
    assert truth_ratio_means(improbable, forget=True)["truth_ratio"] == pytest.approx(math.exp(10) / 2)
    # OpenUnlearning's floor decides.
    assert truth_ratio_means(improbable, forget=True)["truth_ratio_openunlearning"] == 0
    assert truth_ratio_means(improbable, forget=False)["truth_ratio_openunlearning"] == 1
    worst = truth_ratio_means([torch.tensor([5000.0, 0.0])] * 3, forget=True)
    assert worst["truth_ratio_openunlearning"] == pytest.approx(1e-10)
    assert math.isfinite(worst["truth_ratio"])


def test_a_ruined_model_has_a_report(model, tokenizer, rows):
    with torch.no_grad():
        model.lm_head.weight *= 5e3
    perturbed = [row | {"perturbed_answer": ["Nobody.", "Nowhere."]} for row in rows["forget"][:4]]
    assert measure_answers(model, [EncodedRow([5, 9, 30], 1)]).nll > 200
    for openunlearning in (False, True):
        assert truth_ratios(model, tokenizer, perturbed, openunlearning=openunlearning).isfinite().all()
    report, _ = evaluate(model, tokenizer, {"forget": perturbed})
    json.dumps(report, allow_nan=False)
    render_page(page_data({"forget": perturbed}, lambda: (model, tokenizer), rows=2))

"""Membership scores have the values of OpenUnlearning's code, and show which rows a model was trained on."""

from __future__ import annotations

import copy
import math
import zlib

import pytest
import torch
from transformers import LlamaForCausalLM

from eua import EUAError
from eua.data.rows import EncodedRow, encode_rows
from eua.evaluation import membership
from eua.evaluation.membership import (
    compressed_lengths,
    gradient_norms,
    mean_of_lowest,
    membership_auc,
    membership_aucs,
    membership_scores,
    membership_similarity,
    privacy_leakage,
    privacy_score,
    standardized_log_likelihoods,
)
from eua.model.head import Head
from tests.evaluation.toy_world import MEASURED, REFERENCE_BIGRAMS, BigramModel, Letters

SAME = {"loss": 0.5, "zlib": 0.4, "min_k": 0.6, "min_k_plus_plus": 0.5}


@pytest.fixture
def toy() -> BigramModel:
    return BigramModel()


def test_scores_have_openunlearnings_values(toy):
    scores = membership_scores(toy, Letters(), MEASURED, reference=BigramModel(REFERENCE_BIGRAMS), gradients=True)
    expected = {
        "loss": [2.514316, 0.812686, 1.245784],
        "zlib": [0.228574, 0.081269, 0.103815],
        "min_k": [4.185183, 0.185182, 3.440190],
        "min_k_plus_plus": [3.789234, -0.432641, 3.174423],
        "reference": [0.213647, -0.581354, 0.518680],
        "gradient_norm": [0.825289, 0.207766, 0.471774],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].tolist() == pytest.approx(values, abs=2e-6), name


def test_all_tokens_may_count_as_lowest(toy):
    scores = membership_scores(toy, Letters(), MEASURED, lowest=1.0)
    assert scores["min_k"].tolist() == pytest.approx([3.051379, 0.185182, 1.514316], abs=2e-6)
    assert scores["min_k_plus_plus"].tolist() == pytest.approx([2.576729, -0.432641, 0.758202], abs=2e-6)
    for share in (0, 1.5):
        with pytest.raises(EUAError, match=rf"lowest = {share}, but it is the share .*: give a number above 0 and up to 1"):
            membership_scores(toy, Letters(), MEASURED, lowest=share)


def test_an_answer_of_one_token_has_no_lowest_ones(toy):
    scores = membership_scores(toy, Letters(), [EncodedRow([3, 1], 1)], gradients=True)
    assert scores["min_k"].item() == scores["min_k_plus_plus"].item() == 0
    assert scores["gradient_norm"].isnan().all()
    assert scores["loss"].item() == pytest.approx(0.185182, abs=2e-6)
    assert mean_of_lowest(torch.tensor([])) == 0


@pytest.mark.parametrize(
    ("order", "values"),
    [(1.0, [1.837818, 0.338095, 1.158335]), (2.0, [0.825289, 0.207766, 0.471774]), (math.inf, [0.492390, 0.169047, 0.322647])],
)
def test_gradient_norms_have_openunlearnings_values(toy, order, values):
    assert gradient_norms(toy, MEASURED, order=order).tolist() == pytest.approx(values, abs=2e-6)
    assert toy.head.weight.grad is None
    assert not toy.training


def test_gradient_norms_are_means_over_tensors_without_dropout(model, tokenizer, rows):
    (row,) = encode_rows(rows["forget"][:1], tokenizer, None)
    batch, end = torch.tensor([row.input_ids]), row.prompt_length
    logits = model(batch).logits[0, end - 1 : -2]
    torch.nn.functional.cross_entropy(logits, batch[0, end:-1]).backward()
    expected = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).mean()
    model.zero_grad()
    model.model.layers[0].self_attn.attention_dropout = 0.9  # acts in train mode only
    model.train()
    torch.testing.assert_close(gradient_norms(model, [row])[0], expected.detach())
    assert model.training
    model.requires_grad_(False)
    with pytest.raises(EUAError, match="has no parameter that requires a gradient.*requires_grad_"):
        gradient_norms(model, [row])


def test_standardized_log_likelihoods_do_not_depend_on_tiles(monkeypatch):
    torch.manual_seed(0)
    head, hidden, targets = Head(torch.randn(50, 8), None), torch.randn(33, 8), torch.randint(50, (33,))
    monkeypatch.setattr(membership, "TILE_BYTES", 4 * 50 * 5)
    found = standardized_log_likelihoods(head, hidden, targets)
    logs = head.logits(hidden).double().log_softmax(-1)
    mean = (logs.exp() * logs).sum(-1)
    variance = (logs.exp() * logs**2).sum(-1) - mean**2
    torch.testing.assert_close(found, ((logs[range(33), targets] - mean) / variance.sqrt()).float())
    # A certain model has no variance, and tokens that are impossible in float32 have a finite score.
    certain = standardized_log_likelihoods(Head(500 * torch.eye(8), None), torch.eye(8)[:2], torch.tensor([0, 3]))
    assert certain.tolist() == pytest.approx([0, -500 / 1e-3], rel=1e-3)


def test_texts_are_compressed_without_special_tokens(tokenizer, rows):
    encoded = encode_rows(rows["forget"][:2], tokenizer, None)
    assert encoded[0].answer_ids[-1] == tokenizer.eos_token_id
    only_end = EncodedRow([5, tokenizer.eos_token_id], 1)
    lengths = compressed_lengths([*encoded, only_end], tokenizer)
    assert lengths[2] == 8
    assert lengths[:2].tolist() == [len(zlib.compress(f" {row['answer']}".encode())) for row in rows["forget"][:2]]


def test_a_short_text_has_the_length_that_zlib_gives_it():
    class Cat:
        def batch_decode(self, ids, skip_special_tokens):
            return ["The cat sat on the mat."] * len(ids)

    assert compressed_lengths([EncodedRow([1, 2], 1)], Cat()).tolist() == [28]


def test_aucs_count_holdout_rows_as_positive():
    assert membership_auc(torch.tensor([0.1, 0.4, 0.4]), torch.tensor([0.4, 0.8])) == pytest.approx(0.833333, abs=1e-6)
    assert membership_auc(torch.tensor([0.1, math.nan]), torch.tensor([0.4])) == 1
    with pytest.raises(EUAError, match="The holdout rows have no membership scores, .*: give rows whose answers"):
        membership_auc(torch.tensor([0.1]), torch.tensor([math.nan]))


def test_privacy_has_openunlearnings_values():
    assert privacy_leakage(0.7, 0.4) == pytest.approx(-50.0)
    assert privacy_leakage(0.7) == pytest.approx(-40.0)
    assert membership_similarity(0.7, 0.4) == pytest.approx(0.25)
    assert membership_similarity(0.2, 0.4) == pytest.approx(0.5)
    assert membership_similarity(1.0, 0.3) == 0
    assert membership_similarity(0.7, 0.0) is None
    assert privacy_leakage(1.0, 1.0) == 0
    # 1 − |0.7 − 0.5|/0.5 = 0.6 for the loss, 1 for the others: 4/(1/0.6 + 3)
    assert privacy_score(SAME | {"loss": 0.7}, SAME) == pytest.approx(4 / (1 / 0.6 + 3))
    assert privacy_score(SAME, SAME) == 1
    assert privacy_score(SAME, SAME | {"zlib": 0.0}) is None


def test_a_model_that_knows_the_rows_is_found_out(known: LlamaForCausalLM, model, tokenizer, rows):
    """Holdout rows are like the rows to forget, but about people that the model has never heard of."""
    holdout = [
        {"question": row["question"].replace(name, other), "answer": row["answer"].replace(name, other)}
        for row in rows["forget"]
        for name in [next(word for word in row["answer"].split() if word in row["question"])]
        for other in ["Zenobia"]
    ]
    sets = [encode_rows(of_set, tokenizer, None) for of_set in (rows["forget"], holdout)]

    def aucs(measured: LlamaForCausalLM) -> dict[str, float]:
        return membership_aucs(*(membership_scores(measured, tokenizer, of_set, gradients=True) for of_set in sets))

    trained, untrained = aucs(known), aucs(model)
    assert all(value > 0.9 for value in trained.values()), trained
    assert privacy_leakage(trained["min_k"], untrained["min_k"]) < -50
    assert privacy_score(trained, untrained) < 0.6
    assert privacy_leakage(untrained["min_k"], aucs(copy.deepcopy(model))["min_k"]) == 0
    assert privacy_score(untrained, untrained) == 1


def test_scores_do_not_depend_on_the_batch(model, tokenizer, rows):
    encoded = encode_rows([*rows["forget"], rows["forget"][0]], tokenizer, None)
    alone = membership_scores(model, tokenizer, encoded, batch_size=1)
    for name, values in membership_scores(model, tokenizer, encoded, batch_size=4).items():
        torch.testing.assert_close(values, alone[name], rtol=1e-4, atol=1e-4)
        assert values[0] == values[-1]


def test_scores_of_bfloat16_models_are_computed_in_float32(model, tokenizer, rows):
    encoded = encode_rows(rows["forget"], tokenizer, None)
    exact = membership_scores(model, tokenizer, encoded, gradients=True)
    rounded = membership_scores(model.bfloat16(), tokenizer, encoded, gradients=True)
    for name, values in rounded.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, exact[name], rtol=0.02, atol=0.02)

"""leak@k: its estimates, and the scores that it is computed from."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from eua import EUAError
from eua.evaluation.leaks import SentenceEmbedder, leak_at_k, leak_curve, rouge_l_recall
from eua.evaluation.said import KeyedFact, SaidFact


@pytest.mark.parametrize(("k", "expected"), [(1, 0.375), (2, 0.566667), (3, 0.7), (4, 0.8)])
def test_the_expected_maximum_of_worked_values(k, expected):
    assert float(leak_at_k(torch.tensor([0.8, 0.1, 0.4, 0.2]), k)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.3), (2, 0.533333), (4, 0.833333), (8, 1.0)])
def test_the_probability_of_a_leak_of_worked_values(k, expected):
    leaks = torch.tensor([True] * 3 + [False] * 7)
    assert float(leak_at_k(leaks, k)) == pytest.approx(expected, abs=1e-6)
    assert float(leak_at_k(leaks, k)) == pytest.approx(1 - math.comb(7, k) / math.comb(10, k), abs=1e-12)


def test_the_estimate_is_the_mean_over_all_subsets():
    scores = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(1, 8):
        subsets = torch.stack([scores[..., list(chosen)].amax(-1) for chosen in combinations(range(7), k)])
        assert torch.allclose(leak_at_k(scores, k), subsets.mean(0), rtol=0, atol=1e-12)


def test_many_samples_do_not_overflow():
    leaks = torch.arange(1000) < 1
    assert float(leak_at_k(leaks, 500)) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(EUAError, match=rf"leak@{k} was asked for, but each question has 4 answers.*: sample more"):
        leak_at_k(torch.zeros(4), k)


def said_fact(sampled: list[list[int]], texts: list[list[str]], answer: str = "It is Paris.") -> SaidFact:
    count = len(sampled)
    fact = KeyedFact("fact", "forget", ("Paris",), tuple(f"{i}?" for i in range(count)), answer=answer)
    return SaidFact(fact, torch.zeros(count).bool(), torch.tensor(sampled).bool(), ("",) * count, tuple(map(tuple, texts)))


SAID = [
    said_fact([[1, 0], [0, 0]], [["It is Paris.", "no"], ["what", "is it"]]),
    said_fact([[1, 1]], [["Paris", "Paris is it"]], "Here is Paris"),
]


def test_the_curve_by_key_is_the_mean_over_wordings():
    assert leak_curve(SAID) == pytest.approx({1: (0.5 + 0 + 1) / 3, 2: (1 + 0 + 1) / 3})
    assert leak_curve(SAID, ks=[2]) == pytest.approx({2: 2 / 3})


def test_the_curve_by_rouge():
    recalls = [[1, 0], [0, 1 / 3], [1 / 3, 1 / 3]]  # "is it" and "It is Paris" have one word in order
    expected = {1: sum(map(sum, recalls)) / 6, 2: sum(map(max, recalls)) / 3}
    assert leak_curve(SAID, rouge_l_recall) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("the cats sat near a mat", "The cat sat on the mat.", 0.666667),
        ("He was born in Chile", "Jaime Vasquez was born in Santiago, Chile", 0.571429),
        ("It is Paris, the capital of France", "Paris", 1.0),
        ("", "Paris", 0.0),
    ],
)
def test_rouge_of_worked_values(text, reference, expected):
    assert float(rouge_l_recall([text], [reference])) == pytest.approx(expected, abs=1e-6)


def test_what_a_curve_needs():
    with pytest.raises(EUAError, match=r"no sampled answers.*: call said_in_wordings"):
        leak_curve([said_fact([[]], [[]])])
    with pytest.raises(EUAError, match=r"'fact' has no answer.*: give the KeyedFact an answer"):
        leak_curve([said_fact([[1]], [["Paris"]], answer="")], rouge_l_recall)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny random BERT."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "it", "no", "what", "here", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_embedding_is_the_mean_of_a_text_alone(bert):
    embedder = SentenceEmbedder(bert, batch_size=2)
    texts = ["it is paris", "no", "what is it no it is", "no", ""]
    found = embedder.embed(texts)
    model, tokenizer = BertModel.from_pretrained(bert).eval(), BertTokenizerFast.from_pretrained(bert)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, mean / mean.norm(), rtol=0, atol=1e-5)


def test_similarity_is_the_cosine_of_pairs(bert):
    embedder = SentenceEmbedder(bert)
    same, other = embedder(["it is paris", "it is paris"], ["it is paris", "no no no"])
    assert float(same) == pytest.approx(1, abs=1e-5)
    assert float(other) < 0.999
    assert leak_curve(SAID, embedder)[2] <= 1


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(EUAError, match=r"cannot be loaded as a model of sentence embeddings.*: name the folder of one"):
        SentenceEmbedder(tmp_path)

"""The probe, which watches energies while an answer is generated and stops it midway if they rise."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation import BaseStreamer

from eua import EnergyGuard, EUAError
from eua.data.rows import encode_prompts
from eua.guard.guard import GUARD_FILE
from eua.guard.scores import answer_scores
from eua.model.asking import answer
from eua.model.head import output_head
from eua.statistics import conformal_threshold
from tests.conftest import batch_of
from tests.guard.test_guarded_generate import CHAT


def window_means(model: LlamaForCausalLM, ids: list[int], window: int, new_tokens: int) -> list[float]:
    """By hand, for one row, from the logits of greedy steps: the mean at every step that has a whole window."""
    energies: list[float] = []
    prompt = torch.tensor([ids])
    for _ in range(new_tokens):
        with torch.no_grad():
            z = model(prompt).logits[0, -1]
        energies.append(float(-z.logsumexp(dim=0)))
        prompt = torch.cat([prompt, z.argmax().view(1, 1)], dim=1)
        if prompt[0, -1] == model.config.eos_token_id:
            break
    return [sum(energies[i - window : i]) / window for i in range(window, len(energies) + 1)]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_answers_score_their_highest_window(known, tokenizer, questions, window):
    ids = encode_prompts(questions, tokenizer)
    expected = [max(window_means(known, row, window, 24), default=-torch.inf) for row in ids]
    for batch_size in (1, 4):
        found = answer_scores(known.train(), ids, window=window, new_tokens=24, batch_size=batch_size)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert known.training
    known.eval()


def test_energies_of_outputs_are_those_of_hidden_states(model):
    torch.manual_seed(0)
    head = replace(output_head(model), bias=torch.randn(model.config.vocab_size), logit_scale=0.7, softcap=5.0)
    hidden = torch.randn(6, 32)
    output = torch.nn.functional.linear(hidden, head.weight, head.bias)
    torch.testing.assert_close(head.energy_of_output(output, 2.0), head.energy(hidden, 2.0))


@pytest.fixture
def means(known, tokenizer, questions) -> list[list[float]]:
    return [window_means(known, ids, 3, 40) for ids in encode_prompts(questions, tokenizer)]


@pytest.fixture
def watching(guard, means) -> EnergyGuard:
    """Refuses nothing, and stops some of the answers at different places."""
    highest = sorted(max(row) for row in means)
    return replace(guard, threshold=100.0, probe_window=3, probe_tokens=40, probe_threshold=(highest[1] + highest[2]) / 2)


def stops(means: list[list[float]], guard: EnergyGuard) -> list[int | None]:
    """The number of tokens before the stop, for each answer."""
    places = [[i + 2 for i, mean in enumerate(row) if mean > guard.probe_threshold] for row in means]
    return [min(found, default=None) for found in places]


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"use_cache": False}], ids=["plain", "penalty", "no-cache"]
)
def test_an_answer_is_stopped_where_its_energy_rises(known, tokenizer, questions, watching, means, options):
    batch = batch_of(tokenizer, questions)
    width = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 40, "do_sample": False} | options
    plain = known.generate(**batch, **settings)
    with watching.attach(known) as handle:
        guarded = known.generate(**batch, **settings)
    assert not handle.refused.any()
    assert 0 < handle.stopped.sum() < len(questions)
    expected = stops(means, watching)
    if "repetition_penalty" not in options:
        assert handle.stopped.tolist() == [place is not None for place in expected]
        assert len({place for place in expected if place is not None}) > 1
    for row, stopped in enumerate(handle.stopped.tolist()):
        said, theirs = guarded[row, width:].tolist(), plain[row, width:].tolist()
        if not stopped:
            assert said[: len(theirs)] == theirs[: len(said)]
            assert set(said[len(theirs) :]) | set(theirs[len(said) :]) <= {tokenizer.pad_token_id}
        elif "repetition_penalty" in options:  # the penalty changes the answer, so the stop may be elsewhere
            stop = list(watching.stop_ids)
            places = [i for i in range(2, len(said)) if said[i : i + len(stop)] == stop[: len(said) - i]]
            assert places
            assert said[: places[0]] == theirs[: places[0]]
        else:
            refusal = list(watching.stop_ids)[: 40 - expected[row]]
            assert said[: expected[row]] == theirs[: expected[row]]
            assert said[expected[row] :][: len(refusal)] == refusal
            assert set(said[expected[row] + len(refusal) :]) <= {tokenizer.pad_token_id}


def test_a_space_separates_the_refusal_from_a_stopped_answer(known, tokenizer, questions):
    """In a chat template a refusal begins without a space."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    guard = EnergyGuard.calibrate(known, chatty, questions, tolerance=0.2)
    for each in (guard, guard.with_refusal("Not for me.", chatty)):
        assert chatty.decode(each.refusal_ids) == f"{each.refusal_text}<eos>"
        assert chatty.decode(each.stop_ids) == f" {each.refusal_text}<eos>"
    apart = replace(guard, threshold=100.0, probe_window=2, probe_threshold=-100.0)  # stops everything at its second token
    plain = answer(known, chatty, questions, max_new_tokens=1)
    with apart.attach(known):
        assert answer(known, chatty, questions) == [f"{text} {guard.refusal_text}" for text in plain]


def test_a_stream_shows_what_is_returned(known, tokenizer, questions, watching):
    class Collecting(BaseStreamer):
        def __init__(self):
            self.shown = []

        def put(self, value):
            self.shown += value.flatten().tolist()

        def end(self):
            pass

    for question in questions:
        streamer = Collecting()
        with watching.attach(known):
            output = known.generate(**batch_of(tokenizer, [question]), max_new_tokens=40, do_sample=False, streamer=streamer)
        assert streamer.shown == output[0].tolist()


@pytest.mark.parametrize("first_tokens", [0, 2])
def test_refused_prompts_are_refused_with_a_probe_too(known, tokenizer, questions, guard, watching, first_tokens):
    both = EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, first_tokens=first_tokens)
    scores = both.score(known, tokenizer, questions).sort().values
    both = replace(both, threshold=float(scores[2] + scores[3]) / 2, probe_window=3, probe_threshold=watching.probe_threshold)
    batch = batch_of(tokenizer, questions)
    with both.attach(known) as handle:
        output = known.generate(**batch, max_new_tokens=40, do_sample=False)
    assert handle.refused.tolist() == (both.score(known, tokenizer, questions) > both.threshold).tolist()
    assert not (handle.refused & handle.stopped).any()
    for row in handle.refused.nonzero()[:, 0].tolist():
        said = output[row, batch["input_ids"].shape[1] :].tolist()
        assert said[: len(both.refusal_ids)] == list(both.refusal_ids)


def test_a_probe_is_calibrated_on_answers(known, tokenizer, questions, tmp_path):
    prompts = questions
    guard = EnergyGuard.calibrate(known, tokenizer, prompts, probe_window=3, probe_tokens=20, tolerance=0.2)
    means = answer_scores(known, encode_prompts(prompts, tokenizer), window=3, new_tokens=20)
    assert guard.probe_threshold == conformal_threshold(means, 0.2)
    assert "its answer, generated greedily, is stopped within its first 20 tokens" in guard.promise
    guard.save_pretrained(tmp_path)
    assert EnergyGuard.from_pretrained(tmp_path) == guard
    assert json.loads((tmp_path / GUARD_FILE).read_text())["probe_window"] == 3
    plain = EnergyGuard.calibrate(known, tokenizer, prompts, tolerance=0.2)
    assert (plain.threshold, plain.probe_threshold) == (guard.threshold, None)
    assert "stopped" not in plain.promise


def test_what_a_probe_cannot_watch_raises(known, tokenizer, questions, watching):
    with pytest.raises(EUAError, match=r"have 40 tokens within the first 40, .* choose a smaller probe_window"):
        EnergyGuard.calibrate(known, tokenizer, questions, probe_window=40, probe_tokens=40, tolerance=0.5)
    with pytest.raises(EUAError, match=r"probe_window = 100, but answers of probe_tokens = 20 have no window of that length"):
        EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, probe_window=100, probe_tokens=20)
    with pytest.raises(EUAError, match="probe_window = -1 cannot be a number of tokens"):
        EnergyGuard.calibrate(known, tokenizer, questions, tolerance=0.2, probe_window=-1)
    batch = batch_of(tokenizer, questions)
    with watching.attach(known), pytest.raises(EUAError, match="beam search moves tokens between beams"):
        known.generate(**batch, num_beams=2, max_new_tokens=4)
    with torch.no_grad():
        known.lm_head.weight[7] = torch.nan
    broken = replace(watching, model_fingerprint=None, first_tokens=30)
    with broken.attach(known), pytest.raises(EUAError, match="NaN or infinity in the energies"):
        known.generate(**batch, max_new_tokens=4)

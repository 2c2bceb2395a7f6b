"""Tests of the guard in vLLM, with stand-ins for vLLM's runners, against single requests and against ``generate``."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eua import EnergyGuard, EUAError
from eua.guard.guard import GUARD_FILE
from eua.guard.scores import prompt_scores
from tests.vllm_stand_in import BatchUpdate, FirstRunner, Request, SecondRunner, install, serve

VOCABULARY, SEQUENCES = 5, 4
REFUSAL = (3, 1, 2)  # tokens 3 and 1, then the end of the sequence
RUNNERS = pytest.mark.parametrize("runner_class", [FirstRunner, SecondRunner])


@pytest.fixture
def vllm(monkeypatch):
    """``eua.vllm``, imported with the stand-in for vLLM."""
    install(monkeypatch)
    monkeypatch.delenv("EUA_GUARD", raising=False)
    yield importlib.import_module("eua.vllm")
    del sys.modules["eua.vllm"]


def random_model(tokens: list[int]) -> torch.Tensor:
    """Logits (V,) that depend only on the tokens, and such that about half of the prompts are refused."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return 3 * torch.randn(VOCABULARY, generator=generator)


def guard_of(threshold: float, refusal_ids: tuple[int, ...] = REFUSAL, temperature: float = 2.0) -> EnergyGuard:
    known = {"model_fingerprint": "of a model", "tokenizer_fingerprint": "of a tokenizer", "dtype": "float32"}
    return EnergyGuard(threshold, temperature, "No.", refusal_ids, refusal_ids, 0.05, 100, **known)


def config_of(
    folder, vocabulary: int = VOCABULARY, speculative_config=None, cache_dtype="auto", **of_model: object
) -> SimpleNamespace:
    model = {"dtype": torch.float32, "quantization": None, "hf_config": SimpleNamespace()} | of_model
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), revision=None, get_vocab_size=lambda: vocabulary, **model),
        scheduler_config=SimpleNamespace(max_num_seqs=SEQUENCES),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        speculative_config=speculative_config,
    )


@pytest.fixture
def folder(tmp_path):
    guard_of(threshold=-6.0).save_pretrained(tmp_path)
    return tmp_path


def energy(logits: torch.Tensor, temperature: float = 2.0) -> float:
    return -temperature * math.log(sum(math.exp(z / temperature) for z in logits.tolist()))


def refusal_at(step: int) -> int:
    return REFUSAL[min(step, len(REFUSAL) - 1)]


def answer_alone(request: Request, output_decides: bool) -> list[int]:
    """The output of a request; with ``output_decides``, its output so far decides again after every preemption."""
    output: list[int] = []
    refused = energy(random_model(request.prompt)) > -6.0
    for step in range(request.length):
        if output_decides and step > 0 and step in request.resumed_at:
            refused = output == [refusal_at(i) for i in range(step)]
        output.append(refusal_at(step) if refused else int(random_model(request.prompt + output).argmax()))
    return output


@RUNNERS
@pytest.mark.parametrize("overlapped", [False, True], ids=["in-turn", "overlapped"])
@given(seed=st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_every_request_gets_the_same_output_as_alone(vllm, folder, runner_class, overlapped, seed):
    random = Random(seed)
    requests = [
        Request([random.randrange(VOCABULARY) for _ in range(random.randint(1, 6))], length=random.randint(1, 6))
        for _ in range(8)
    ]
    runner = runner_class(vllm.EnergyGuardProcessor, config_of(folder), random_model, random, overlapped)
    serve(runner, requests, random, SEQUENCES)
    for request in requests:
        assert request.tokens == answer_alone(request, output_decides=runner_class is SecondRunner)


@RUNNERS
def test_the_answers_are_those_of_guarded_generate(vllm, tmp_path, model, tokenizer, rows, runner_class):
    questions = [row["question"] for row in rows["test"][:8]]
    prompts = [tokenizer(question)["input_ids"] for question in questions]
    scores = prompt_scores(model, prompts).sort().values
    guard = guard_of(float(scores[3] + scores[4]) / 2, refusal_ids=(5, 6, 7, model.config.eos_token_id), temperature=1.0)
    guard.save_pretrained(tmp_path)

    @torch.no_grad()
    def next_logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0, -1].float()

    random = Random(0)
    config = config_of(tmp_path, vocabulary=model.config.vocab_size)
    requests = [Request(ids, length=8) for ids in prompts]
    serve(runner_class(vllm.EnergyGuardProcessor, config, next_logits, random, True), requests, random, SEQUENCES)

    refused = []
    with replace(guard, model_fingerprint=None).attach(model) as attached:
        for request in requests:
            output = model.generate(torch.tensor([request.prompt]), max_new_tokens=8, do_sample=False)
            expected = output[0, len(request.prompt) :].tolist()
            assert request.tokens[: len(expected)] == expected
            refused.append(bool(attached.refused))
    assert sum(refused) == 4


@pytest.mark.parametrize("second_interface", [True, False], ids=["0.31-and-later", "before-0.31"])
def test_the_class_meets_the_requirements_of_vllm(monkeypatch, folder, second_interface):
    install(monkeypatch, second_interface)
    monkeypatch.delitem(sys.modules, "eua.vllm", raising=False)
    from tests import vllm_stand_in

    processor_class = importlib.import_module("eua.vllm").EnergyGuardProcessor
    del sys.modules["eua.vllm"]
    assert issubclass(processor_class, vllm_stand_in.FirstInterface)
    assert issubclass(processor_class, vllm_stand_in.SecondInterface) == second_interface
    processor = processor_class(config_of(folder), torch.device("cpu"), False)
    assert isinstance(processor, vllm_stand_in.FirstInterface)
    assert processor.is_argmax_invariant() is False


def test_greedy_sampling_after_penalties_and_temperature_cannot_undo_a_refusal(vllm, folder):
    processor = vllm.EnergyGuardProcessor(config_of(folder), torch.device("cpu"), False)
    processor.update_state(BatchUpdate(1, [], [(0, None, [1], [])], []))
    row = processor.apply(torch.full((1, VOCABULARY), -50.0))[0]
    assert row[REFUSAL[0]] == 0
    assert torch.isinf(row).sum() == VOCABULARY - 1


@RUNNERS
def test_a_score_that_is_not_a_number_is_refused(vllm, folder, runner_class):
    def broken(tokens: list[int]) -> torch.Tensor:
        return torch.full((VOCABULARY,), torch.nan)

    request = Request([1, 2], length=3)
    serve(runner_class(vllm.EnergyGuardProcessor, config_of(folder), broken, Random(0), False), [request], Random(0), SEQUENCES)
    assert request.tokens == list(REFUSAL)


def test_an_answer_that_begins_like_the_refusal_continues_after_a_pause(vllm, tmp_path):
    guard_of(threshold=1e9).save_pretrained(tmp_path)
    processor = vllm.EnergyGuardProcessor(config_of(tmp_path), torch.device("cpu"), False)
    prompt, other = [1, 2], [1, 2]
    output: list[int] = []
    processor.update_state(BatchUpdate(1, [], [(0, None, prompt, output)], []))
    processor.apply(torch.zeros(1, VOCABULARY))
    output.append(REFUSAL[0])
    processor.update_state(BatchUpdate(0, [0], [], []))

    processor.update_state(BatchUpdate(2, [], [(0, None, prompt, [REFUSAL[0]]), (1, None, other, [REFUSAL[0]])], []))
    rows = processor.apply(torch.ones(2, VOCABULARY))
    assert torch.equal(rows[0], torch.ones(VOCABULARY))
    assert rows[1].argmax() == REFUSAL[1]  # the processor does not know this request: it may have been refused


def test_a_running_request_does_not_displace_a_paused_one_from_memory(vllm, tmp_path):
    guard_of(threshold=1e9).save_pretrained(tmp_path)
    processor = vllm.EnergyGuardProcessor(config_of(tmp_path), torch.device("cpu"), False)
    pausing, staying = ([1, 2], []), ([1, 2], [])
    processor.update_state(BatchUpdate(2, [], [(0, None, *pausing), (1, None, *staying)], []))
    processor.apply(torch.zeros(2, VOCABULARY))
    for _, output in (pausing, staying):
        output.append(REFUSAL[0])
    processor.update_state(BatchUpdate(1, [0], [], []))
    for _ in range(3 * SEQUENCES):
        processor.update_state(BatchUpdate(2, [], [(0, None, [3], [])], []))
    processor.update_state(BatchUpdate(2, [], [(0, None, pausing[0], [REFUSAL[0]])], []))
    assert torch.equal(processor.apply(torch.ones(2, VOCABULARY)), torch.ones(2, VOCABULARY))


def test_a_slot_whose_prompt_was_never_scored_is_refused_whoever_had_it_before(vllm, tmp_path):
    guard_of(threshold=1e9).save_pretrained(tmp_path)
    runner = SecondRunner(vllm.EnergyGuardProcessor, config_of(tmp_path), random_model, Random(0), False)
    answered = Request([1, 2], length=2)
    runner.step({answered: 2})
    slot = runner.slots[answered]
    assert not runner.processor.refused[slot]
    runner.processor.add_request(slot, None)
    runner.processor.apply_staged_writes()
    assert runner.processor.refused[slot]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {1: 5.0}),
        ("allowed_token_ids", [1]),
        ("bad_words", ["no"]),
        ("min_tokens", 3),
        ("structured_outputs", object()),
        ("repetition_penalty", 1.1),
        ("logprobs", 0),
        ("prompt_logprobs", 1),
        ("logprob_token_ids", [1]),
        ("prompt_logprob_token_ids", [[1]]),
        ("thinking_token_budget", 0),
        ("trace_decode_token_ids", [1]),
    ],
)
def test_requests_that_the_guard_would_not_cover_are_refused(vllm, name, value):
    harmless = {
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "min_tokens": 0,
        "structured_outputs": None,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "temperature": 0.7,
        "presence_penalty": 1.0,
    }
    vllm.EnergyGuardProcessor.validate_params(SimpleNamespace(**harmless))
    with pytest.raises(EUAError, match=rf"sets {name} = .*guards its answers.*leave it at"):
        vllm.EnergyGuardProcessor.validate_params(SimpleNamespace(**harmless | {name: value}))


def test_the_guard_is_read_from_the_models_folder_or_from_the_one_named(vllm, folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(
        EUAError, match=r"other, but no guard can be read .*other contains no energy_guard\.json.*eua calibrate.*EUA_GUARD"
    ):
        vllm.EnergyGuardProcessor(config_of(other), torch.device("cpu"), False)
    monkeypatch.setenv("EUA_GUARD", str(folder))
    vllm.EnergyGuardProcessor(config_of(other), torch.device("cpu"), False)
    monkeypatch.setenv("EUA_GUARD", str(other))
    with pytest.raises(EUAError, match="EUA_GUARD"):
        vllm.EnergyGuardProcessor(config_of(folder), torch.device("cpu"), False)


def test_the_guard_of_a_model_on_the_hub_is_fetched(vllm, folder, monkeypatch):
    asked = []

    def download(model, name, *, revision, **options):
        asked.append((model, name, revision))
        return str(folder / name)

    monkeypatch.setattr("eua.guard.hub.hf_hub_download", download)
    config = config_of("someone/model")
    config.model_config.revision = "v2"
    vllm.EnergyGuardProcessor(config, torch.device("cpu"), False)
    monkeypatch.setenv("EUA_GUARD", "someone/guard")
    vllm.EnergyGuardProcessor(config, torch.device("cpu"), False)
    assert asked == [("someone/model", GUARD_FILE, "v2"), ("someone/guard", GUARD_FILE, None)]


@RUNNERS
def test_what_cannot_be_guarded_does_not_start(vllm, folder, runner_class):
    def start(config, model=random_model):
        runner = runner_class(vllm.EnergyGuardProcessor, config, model, Random(0), False)
        serve(runner, [Request([1], length=2)], Random(0), SEQUENCES)

    with pytest.raises(EUAError, match=r"speculative decoding.*leave out --speculative-config"):
        start(config_of(folder, speculative_config=object()))
    with pytest.raises(EUAError, match=r"has token 3, but the model has 3 tokens.*calibrate one"):
        start(config_of(folder, vocabulary=3))
    with pytest.raises(EUAError, match=r"returns 5 logits per row, but the model has 6 tokens"):
        start(config_of(folder, vocabulary=6))
    with pytest.raises(EUAError, match=r"computes in bfloat16, but .* calibrated in float32.*start vLLM with --dtype float32"):
        start(config_of(folder, dtype=torch.bfloat16))
    with pytest.raises(EUAError, match=r"quantizes the model while it loads it \(fp8\).*leave out --quantization"):
        start(config_of(folder, quantization="fp8"))
    with pytest.raises(EUAError, match=r"keys and values in fp8.*leave out --kv-cache-dtype"):
        start(config_of(folder, cache_dtype="fp8"))
    start(config_of(folder, quantization="awq", hf_config=SimpleNamespace(quantization_config={}), cache_dtype="float32"))
    replace(guard_of(0.0), first_tokens=2).save_pretrained(folder)
    with pytest.raises(EUAError, match="reads the first 2 generated tokens.*calibrate one with first_tokens = 0"):
        start(config_of(folder))
    replace(guard_of(0.0), probe_window=2, probe_threshold=0.0).save_pretrained(folder)
    with pytest.raises(EUAError, match="has a probe, but this processor decides .* calibrate one without a probe"):
        start(config_of(folder))


def test_the_threshold_is_on_the_side_of_answers(vllm, folder):
    """A score that equals the threshold is answered, as in ``generate``."""
    logits = random_model([1])
    at = float(-2.0 * torch.logsumexp(logits / 2.0, dim=-1))
    for threshold, refused in ((at, False), (at - 1e-4, True)):
        replace(guard_of(0.0), threshold=threshold).save_pretrained(folder)
        processor = vllm.EnergyGuardProcessor(config_of(folder), torch.device("cpu"), False)
        processor.update_state(BatchUpdate(1, [], [(0, None, [1], [])], []))
        row = processor.apply(logits.clone()[None])[0]
        assert torch.equal(row, logits) != refused

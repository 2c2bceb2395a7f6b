"""The guard inside vLLM: ``vllm serve MODEL --logits-processors eua.vllm:EnergyGuardProcessor``.

The processor reads ``energy_guard.json`` from the folder or hub repository that ``EUA_GUARD`` names, else from the model's.
Without a guard, vLLM does not start. The code follows the sources of vLLM 0.24.0, 0.27.1, 0.30.0, 0.31.0, 0.32.0 and 0.33.0.
These have two model runners. From 0.31 on, each runner has its own interface for logits processors, so one class serves both.

A processor gets rows of the model's final logits: scaled, soft-capped, cut to the ``vocab_size`` of its config, as float32.
Settings that change them before the processor (logit bias, allowed tokens, bad words, minimal length, a grammar, and in the
second runner penalties) would change the score. Settings that show or steer answers independently of the processor (logprobs,
beam search, a thinking budget, a given answer) would bypass the refusal. :meth:`EnergyGuardProcessor.validate_params` rejects
requests with such settings. Temperature, top-k, top-p, min-p, presence and frequency penalties affect neither the score nor
the refusal.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
from vllm.v1.sample.logits_processor import MoveDirectionality

from eua.errors import EUAError
from eua.guard.guard import EnergyGuard

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface
except ImportError:  # before 0.31 the second runner took no processors, and vLLM used the first runner for a model with one
    SecondInterface = object

GUARD_VARIABLE = "EUA_GUARD"
# Fields of SamplingParams with which the guard would not see the model's logits or not control the answer, and their harmless
# values. Some versions lack some of these fields.
CHANGE_THE_SCORE: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "min_tokens": (0, None),
    "structured_outputs": (None,),
    "repetition_penalty": (1.0,),
}
GO_AROUND: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "prompt_logprob_token_ids": (None, []),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None, []),
}


class EnergyGuardProcessor(FirstInterface, SecondInterface):
    """The class that vLLM loads by its path. A call returns the processor for the runner that calls it.

    Raises:
        EUAError: if no guard can be read, if it belongs to another vocabulary, if vLLM computes in another dtype than the
            calibration did, or with speculative decoding.
    """

    def __new__(cls, vllm_config: Any, *place: Any) -> Any:
        """``place`` is (device, is_pin_memory) in the first runner, and (request states,) in the second."""
        return (FirstRunnerGuard if len(place) == 2 else SecondRunnerGuard)(vllm_config, *place)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise :class:`EUAError`, which vLLM's server turns into status 400, for requests that the guard would not cover."""
        for fields, why in (
            (CHANGE_THE_SCORE, "this changes logits before the guard scores the prompt"),
            (GO_AROUND, "this shows or steers answers without the guard"),
        ):
            for name, harmless in fields.items():
                value = getattr(sampling_params, name, harmless[0])
                if value not in harmless:
                    raise EUAError(
                        f"The request sets {name} = {value!r}, but this server guards its answers, and {why}: leave it at "
                        f"{harmless[0]!r}. (Beam search sets logprobs. If the model's generation_config.json sets the field, "
                        "undo that with the server's --override-generation-config.)"
                    )


@dataclass
class _Request:
    """A row in the first runner's batch. ``refused`` is final as soon as there is output."""

    prompt_ids: list[int] | None
    output_ids: list[int]  # vLLM's own list, which grows
    refused: bool = True

    @property
    def answers(self) -> bool:
        return bool(self.output_ids) and not self.refused


class FirstRunnerGuard(FirstInterface):
    """The processor for the runner whose batch is a list of rows (``vllm/v1/worker/gpu_model_runner.py``).

    A row is scored as long as its request has no output. The runner also computes logits, which it drops, for a prompt that is
    only partly read, so the last such score is the prompt's. Paused requests leave the batch and come back with their output;
    :meth:`_resume` decides about them.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rule = _Rule(vllm_config, device)
        self.requests: dict[int, _Request] = {}
        # Paused requests whose answer so far could also be the beginning of the refusal.
        self.paused: deque[_Request] = deque(maxlen=2 * vllm_config.scheduler_config.max_num_seqs)

    def is_argmax_invariant(self) -> bool:
        return False  # True would mean: after the temperature, and never for greedy rows

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        before, requests = list(self.requests.values()), self.requests
        for index in batch_update.removed:
            requests.pop(index, None)
        added = {index: _Request(prompt_ids, output_ids) for index, _, prompt_ids, output_ids in batch_update.added}
        requests.update(added)
        for source, target, direction in batch_update.moved:
            moved, replaced = requests.pop(source, None), requests.pop(target, None)
            if moved is not None:
                requests[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                requests[source] = replaced

        staying = {id(request) for request in requests.values()}
        self.paused.extend(
            request
            for request in before
            if id(request) not in staying and request.answers and self.rule.may_be_refusal(request.output_ids)
        )
        for request in added.values():
            if request.output_ids:
                request.refused = self._resume(request)

    def _resume(self, request: _Request) -> bool:
        """Whether a request that comes with output was refused, as its output shows or, if that is unclear, as was remembered.

        An answer may begin like the refusal. Such paused requests are remembered by their prompt, which stays the same object
        as long as the request exists. A request that is not remembered counts as refused.
        """
        if not self.rule.may_be_refusal(request.output_ids):
            return False
        return request.prompt_ids is None or all(other.prompt_ids is not request.prompt_ids for other in self.paused)

    def apply(self, logits: Tensor) -> Tensor:
        """(R, V) → (R, V), in place."""
        self.rule.check_vocabulary(logits)
        undecided = [index for index, request in self.requests.items() if not request.output_ids]
        if undecided:
            for index, refused in zip(undecided, self.rule.refuses(logits[undecided]).tolist(), strict=True):
                self.requests[index].refused = refused
        rows = [index for index, request in self.requests.items() if request.refused]
        if rows:
            tokens = [self.rule.token(len(self.requests[index].output_ids)) for index in rows]
            logits[rows] = -torch.inf
            logits[rows, tokens] = 0.0
        return logits


class SecondRunnerGuard(SecondInterface):
    """The processor for "Model Runner V2" (``vllm/v1/worker/gpu/model_runner.py``). Requests keep their slots.

    A slot counts as refused until the last token of its prompt has been scored. A preempted request comes back with its output
    in any slot. It continues with the refusal if its output so far is the beginning of one, even if it is an answer that
    begins like the refusal. Nothing here waits for the device.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.rule = _Rule(vllm_config, req_states.device)
        self.states = req_states
        self.refused = torch.ones(req_states.max_num_reqs, dtype=torch.bool, device=req_states.device)
        self.added: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.added.append(req_idx)
        return True

    def apply_staged_writes(self) -> None:
        if not self.added:
            return
        self.refused[self.added] = True
        for slot in self.added:
            start, end = int(self.states.prompt_len.np[slot]), int(self.states.prefill_len.np[slot])
            if end > start:
                output = self.states.all_token_ids.gpu[slot, start:end]
                steps = torch.arange(end - start, device=output.device)
                self.refused[slot] = (output == self.rule.tokens(steps)).all()
        self.added.clear()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """(R, V) → (R, V), in place. One row per request in the batch, since there are no drafts."""
        self.rule.check_vocabulary(logits)
        slots = ctx.expanded_idx_mapping.long()
        lengths = ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]  # exact without drafts; may be padded
        prompts, prefills = (lens.np[ctx.idx_mapping_np] for lens in (self.states.prompt_len, self.states.prefill_len))
        at_prompt_end = ((lengths == prompts) & (prefills == prompts)).nonzero()[0]  # prefills are longer after preemption
        if len(at_prompt_end):
            rows = torch.from_numpy(at_prompt_end).to(logits.device, non_blocking=True)
            self.refused[slots[rows]] = self.rule.refuses(logits[rows])
        tokens = self.rule.tokens(ctx.pos + 1 - self.states.prompt_len.gpu[slots])[:, None]
        refused = self.refused[slots][:, None]
        forced = torch.where(refused, 0.0, logits.gather(1, tokens))
        return logits.masked_fill_(refused, -torch.inf).scatter_(1, tokens, forced)


class _Rule:
    """The guard of the model that vLLM serves: which rows of logits to refuse, and what to write into them."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        if vllm_config.speculative_config is not None:
            raise EUAError(
                "vLLM was started with speculative decoding, but the guard cannot follow the logits of drafts: leave out "
                "--speculative-config."
            )
        model = vllm_config.model_config
        guard, place = _read_guard(model.model, model.revision)
        if guard.first_tokens:
            raise EUAError(
                f"The guard of {place} reads the first {guard.first_tokens} generated tokens, but vLLM shows them before the "
                "guard can decide: calibrate one with first_tokens = 0."
            )
        if guard.probe_threshold is not None:
            raise EUAError(
                f"The guard of {place} has a probe, but this processor decides only at the prompt's last token and cannot stop "
                "an answer midway: calibrate one without a probe."
            )
        _check_precision(guard, place, vllm_config)
        self.guard = guard
        self.refusal = guard.refusal_ids
        self.vocabulary = model.get_vocab_size()
        if max(self.refusal) >= self.vocabulary:
            raise EUAError(
                f"The refusal of the guard of {place} has token {max(self.refusal)}, but the model has {self.vocabulary} "
                f"tokens, so the guard is for another model: calibrate one for this, or set {GUARD_VARIABLE} to its folder."
            )
        self._refusal_on_device = torch.tensor(self.refusal, device=device)

    def check_vocabulary(self, logits: Tensor) -> None:
        """Raise if logits have another width than in the calibration."""
        if logits.shape[1] != self.vocabulary:
            raise EUAError(
                f"vLLM returns {logits.shape[1]} logits per row, but the model has {self.vocabulary} tokens, so its energies "
                "would be over another vocabulary than in the calibration: this model is not supported."
            )

    def refuses(self, logits: Tensor) -> Tensor:
        """(R, V) raw logits at the last tokens of R prompts → (R,) bool. A NaN is refused."""
        temperature = self.guard.temperature
        return self.guard.refuses(-temperature * torch.logsumexp(logits.float() / temperature, dim=-1))

    def token(self, step: int) -> int:
        """The token at ``step`` of a refusal, which repeats the end-of-sequence token after its end."""
        return self.refusal[min(step, len(self.refusal) - 1)]

    def tokens(self, steps: Tensor) -> Tensor:
        """:meth:`token` on the device. Negative steps count as step 0."""
        return self._refusal_on_device[steps.clamp(0, len(self.refusal) - 1)]

    def may_be_refusal(self, output_ids: Sequence[int]) -> bool:
        """Whether a refused request could have this output. −1 is vLLM's placeholder for a token that it does not know yet."""
        return all(token in (-1, self.token(step)) for step, token in enumerate(output_ids))


def _check_precision(guard: EnergyGuard, place: str, vllm_config: Any) -> None:
    """Raise if vLLM would round differently than the calibrated model, by far more than its kernels do."""
    model = vllm_config.model_config
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != guard.dtype:
        raise EUAError(
            f"vLLM computes in {dtype}, but the guard of {place} was calibrated in {guard.dtype}, where energies differ by up "
            f"to tenths of a nat: start vLLM with --dtype {guard.dtype}, or calibrate a guard in {dtype}."
        )
    if model.quantization is not None and getattr(model.hf_config, "quantization_config", None) is None:
        raise EUAError(
            f"vLLM quantizes the model while it loads it ({model.quantization}), but the guard of {place} was calibrated for "
            "the model as it is saved: leave out --quantization, or save the quantized model and calibrate a guard for it."
        )
    cache = vllm_config.cache_config.cache_dtype
    if cache not in ("auto", guard.dtype):
        raise EUAError(
            f"vLLM keeps its cache of keys and values in {cache}, but the guard of {place} was calibrated with {guard.dtype}: "
            "leave out --kv-cache-dtype."
        )


def _read_guard(model: str, revision: str | None) -> tuple[EnergyGuard, str]:
    """The guard, and the name of its folder or repository: the one that the environment names, else the model's."""
    named = os.environ.get(GUARD_VARIABLE)
    try:
        if named:
            return EnergyGuard.from_pretrained(named), named
        return EnergyGuard.from_pretrained(model, revision=revision), model
    except EUAError as error:
        raise EUAError(
            f"vLLM was started with {model}, but no guard can be read for it: {error} The environment variable "
            f"{GUARD_VARIABLE} may name another folder or repository that contains one."
        ) from error

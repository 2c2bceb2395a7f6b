"""Guarded ``model.generate``: the handle of an attached guard, and the call that scores rows and writes refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import BaseStreamer, GenerationMode

from eua.errors import EUAError
from eua.guard.covered_calls import check_call, given_ids, prompt_mask
from eua.model.energy_recorder import EnergyProbe, EnergyRecorder, end_ids
from eua.model.head import vocabulary_and_device

if TYPE_CHECKING:
    from eua.guard.guard import EnergyGuard

GENERATE_PARAMETERS = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
DEFAULT_NEW_TOKENS = 20  # what transformers generates where no length is given
TEXT_INPUTS = {"inputs", "input_ids", "attention_mask", "position_ids", "cache_position", "token_type_ids"}
_NEVER = torch.iinfo(torch.long).max


class GuardHandle:
    """The handle of a guard that is attached to a model.

    ``scores``, ``refused`` and ``stopped`` describe the last ``generate`` call, with one entry per returned row. They are None
    before the guard has decided, and available while the call is still running. ``stopped`` marks answers that the probe ended.

    A copy of the model (``copy.deepcopy``, pickle) is guarded by a copy of the guard; ``save_pretrained`` writes weights only.
    Every call checks that the weights and active adapters are still the ones that the guard was calibrated for, see
    :func:`eua.model.fingerprints.recent_fingerprint`. Threads may share the model; the handle then describes the call that
    started last.
    """

    def __init__(self, guard: EnergyGuard, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        vocabulary, _ = vocabulary_and_device(model)  # raises here, not in a generation, if the model has no plain head
        if max(*guard.refusal_ids, *guard.stop_ids) >= vocabulary:
            raise EUAError(
                f"The refusal has token {max(*guard.refusal_ids, *guard.stop_ids)}, but the model has {vocabulary} tokens, so "
                "the guard is for another model: calibrate one for this model."
            )
        guard.check(model, tokenizer)
        _check_pair(model, guard)
        self.guard = guard
        self.model = model
        self._call: _GuardedCall | None = None
        self._detached = False
        self._generate = model.generate
        self._own_attributes = {name: model.__dict__.get(name) for name in self._put_over_model}
        for name, method in self._put_over_model.items():
            setattr(model, name, method)

    @property
    def _put_over_model(self) -> dict[str, Callable[..., Any]]:
        return {"generate": self._guarded_generate, "init_continuous_batching": self._no_continuous_batching}

    @property
    def scores(self) -> Tensor | None:
        """(R,), in nats."""
        return self._of_last_call(_GuardedCall.scores)

    @property
    def refused(self) -> Tensor | None:
        """(R,) bool."""
        return self._of_last_call(_GuardedCall.decide)

    @property
    def stopped(self) -> Tensor | None:
        """(R,) bool; False for refused rows."""
        return self._of_last_call(_GuardedCall.stopped)

    def _of_last_call(self, values: Callable[[_GuardedCall], Tensor]) -> Tensor | None:
        call = self._call
        return None if call is None or call.refused is None else call.per_sequence(values(call))

    def detach(self) -> None:
        """Restore ``model.generate``. Detaching twice is harmless.

        Raises:
            EUAError: when ``model.generate`` was replaced again in the meantime; the guard then stays attached.
        """
        if self._detached:
            return
        if self.model.__dict__.get("generate") != self._guarded_generate:
            raise EUAError(
                "model.generate was replaced after this guard was attached: undo that first (detach the later guard)."
            )
        self._detached = True
        for name, own in self._own_attributes.items():
            if own is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, own)

    def __enter__(self) -> GuardHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _no_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise EUAError(
            "Continuous batching (generate_batch) bypasses generate, so the guard would not see its prompts: use generate, "
            "`eua serve` or vLLM, or detach the guard."
        )

    def _guarded_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._call = None
        positional = dict(zip(GENERATE_PARAMETERS, args, strict=False))
        if twice := positional.keys() & kwargs.keys():
            raise TypeError(f"generate() got multiple values for {sorted(twice)}")
        kwargs |= positional
        config = check_call(self.model, self.guard, kwargs)
        self.guard.check(self.model, thorough=False)
        self._call = call = _GuardedCall(self.model, self.guard, config, kwargs)
        kwargs["logits_processor"] = LogitsProcessorList([call, *(kwargs.get("logits_processor") or []), _Forcing(call)])
        if self.guard.first_tokens and kwargs.get("streamer") is not None:
            kwargs["streamer"] = _HeldBack(kwargs["streamer"], call)
        with call.listening():
            output = self._generate(**kwargs)
        if not call.energies:  # nothing was generated
            return output
        refused = call.decide()
        if isinstance(output, Tensor):
            return call.rewrite(output)
        output.sequences = call.rewrite(output.sequences)
        if self.guard.first_tokens and refused.any() and "past_key_values" in output:
            output.past_key_values = None  # it contains the tokens that were removed
        return output


def _check_pair(model: PreTrainedModel, guard: EnergyGuard) -> None:
    """Raise if this guard and one that is already attached would interfere with each other."""
    earlier = getattr(model.__dict__.get("generate"), "__self__", None)
    if isinstance(earlier, GuardHandle) and any(g.first_tokens or g.probe_window for g in (guard, earlier.guard)):
        raise EUAError(
            "The model already has a guard, and one of the two reads generated tokens (first_tokens, a probe), which may be "
            "the other's refusal: calibrate both to decide at the prompt, or detach the first."
        )


class _GuardedCall(EnergyRecorder):
    """One ``generate`` call: scores each row, and writes the refusal into flagged rows.

    If the score depends on the prompt alone, it is known before the first token, and the refusal is forced from there on. If
    generated tokens count too, a flagged row ends at once, and :meth:`rewrite` replaces its tokens by the refusal. A probe
    flags a row later, and the refusal follows what the row has said.
    """

    def __init__(
        self, model: PreTrainedModel, guard: EnergyGuard, config: GenerationConfig, arguments: Mapping[str, Any]
    ) -> None:
        eos = end_ids(config.eos_token_id) or [guard.refusal_ids[-1]]
        drafted = config.get_generation_mode(arguments.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION
        super().__init__(model, guard.temperature, guard.first_tokens, eos, drafted)
        self.guard, self.config = guard, config
        self.probe: EnergyProbe | None = None
        if guard.probe_threshold is not None:
            ends = [*eos, *end_ids(config.pad_token_id)]  # a row that a stopping criterion has ended continues as padding
            self.probe, self.stop_above = EnergyProbe(model, guard.temperature, guard.probe_window, ends), guard.probe_threshold
        # The texts that are forced on stopped rows and on refused rows. Each is padded with its end of sequence, so that
        # nothing can follow it.
        longest = max(len(guard.stop_ids), len(guard.refusal_ids))
        self.texts = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids in (guard.stop_ids, guard.refusal_ids)])
        self.refused: Tensor | None = None  # (R,) bool
        self.lets_all_pass = False
        self.since = torch.empty(0, dtype=torch.long)  # (R,) the step at which the refusal of a row begins
        extra = sorted(name for name, value in arguments.items() if isinstance(value, Tensor) and name not in TEXT_INPUTS)
        self._score_other_prompts(_prompt_ids(arguments, config), extra)

    def _score_other_prompts(self, prompts: Sequence[Sequence[int]], extra: Sequence[str]) -> None:
        """Score the prompts that count in addition to, or in place of, the given ones, see :meth:`.Turns.scored_prompts`."""
        turns = self.guard.turns
        parts = [[list(ids)] if turns is None else turns.scored_prompts(ids) for ids in prompts]
        self.own_counts = torch.tensor([ids in of_one for ids, of_one in zip(prompts, parts, strict=True)] or [True])
        self.others = torch.full(self.own_counts.shape, -torch.inf)
        rows = [i for i, of_one in enumerate(parts) if of_one != [prompts[i]]]
        if rows and extra:
            raise EUAError(
                f"The prompts come with {', '.join(extra)}, and the guard cannot give the user's last turn, which it scores "
                "alone, its part of them: send that turn as the only one, or detach the guard."
            )
        if rows:
            self.others[rows] = self.guard.score_ids(self.model, [prompts[i] for i in rows])

    @contextmanager
    def listening(self) -> Iterator[None]:
        with super().listening(), nullcontext() if self.probe is None else self.probe.listening():
            yield

    def scores(self) -> Tensor:
        recorded = super().scores()
        copies = len(recorded) // len(self.others)  # beams, and several answers to one prompt
        own, others = (repeat(x, "prompts -> (prompts copies)", copies=copies) for x in (self.own_counts, self.others))
        return torch.where(own, recorded, -torch.inf).maximum(others)

    def per_sequence(self, values: Tensor) -> Tensor:
        """From the values of all beams, those of the returned sequences."""
        beams, sequences = self.config.num_beams or 1, self.config.num_return_sequences or 1
        if beams == 1:
            return values
        of_prompts = rearrange(values, "(prompts beams) -> prompts beams", beams=beams)[:, 0]
        return repeat(of_prompts, "prompts -> (prompts sequences)", sequences=sequences)

    def decide(self) -> Tensor:
        """Decide which rows to refuse, (R,) bool."""
        if self.refused is None:
            refused = self.guard.refuses(self.scores())
            self.since = torch.where(refused, 0, _NEVER)
            self.lets_all_pass = self.probe is None and not refused.any()
            self.refused = refused
        return self.refused

    def stopped(self) -> Tensor:
        """The rows that the probe has ended, (R,) bool."""
        return ~self.decide() & (self.since < _NEVER)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.lets_all_pass:
            return scores
        super().__call__(input_ids, scores)
        if self.probe is not None:
            self.probe(input_ids, scores)
        if self.is_complete:
            self.decide()
            if self.probe is not None:
                step = input_ids.shape[1] - self.start
                self.since = self.since.minimum(torch.where(self.probe.scores() <= self.stop_above, _NEVER, step))
        return scores

    def force(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (R, V) in which flagged rows can only choose the next token of their refusal."""
        if self.refused is None or self.lets_all_pass:
            return scores
        rows = (self.since < _NEVER).nonzero()[:, 0]
        if rows.numel() == 0:
            return scores
        refused, step = self.refused[rows], input_ids.shape[1] - self.start
        place = (step - self.since[rows]).clamp(max=self.texts.shape[1] - 1)
        if self.first_tokens:
            place[refused] = -1  # ended at once, and rewritten afterwards
        rows, forced = rows.to(scores.device), self.texts[refused.long(), place].to(scores.device)
        scores = scores.clone()
        scores[rows] = -torch.inf
        scores[rows, forced] = 0.0
        return scores

    def rewrite(self, sequences: Tensor) -> Tensor:
        """``sequences`` (R, S) in which the refusal replaces the generated tokens of refused rows."""
        flagged = self.decide().nonzero()[:, 0]
        if self.first_tokens == 0 or flagged.numel() == 0:
            return sequences
        ids = torch.tensor(self.guard.refusal_ids[: self.new_tokens], device=sequences.device)
        pad = self.guard.refusal_ids[-1] if self.config.pad_token_id is None else self.config.pad_token_id
        missing = self.start + len(ids) - sequences.shape[1]
        sequences = torch.nn.functional.pad(sequences, (0, max(missing, 0)), value=pad)
        sequences[flagged, self.start :] = pad
        sequences[flagged[:, None], self.start + torch.arange(len(ids))] = ids
        # The longest row may have been a refused one. If the padding is an end of sequence, one of them belongs to the row.
        places = torch.arange(1, sequences.shape[1] - self.start + 1, device=sequences.device)
        said = (places * (sequences[:, self.start :] != pad)).amax() + int(pad in self.eos.tolist())
        return sequences[:, : self.start + max(int(said), len(ids))]

    @property
    def new_tokens(self) -> int:
        """The most new tokens that the caller allows, or the default of ``generate``."""
        if self.config.max_new_tokens is not None:
            return self.config.max_new_tokens
        return DEFAULT_NEW_TOKENS if self.config.max_length is None else max(0, self.config.max_length - self.start)


class _Forcing(LogitsProcessor):
    """Runs after all other processors and forces the refusals of a call."""

    def __init__(self, call: _GuardedCall) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.call.force(input_ids, scores)


def _prompt_ids(arguments: Mapping[str, Any], config: GenerationConfig) -> list[list[int]]:
    """The prompts of a ``generate`` call without padding; an empty list if there is no prompt."""
    ids, mask = given_ids(arguments), prompt_mask(arguments, config)
    if ids is None or mask is None:
        return []
    return [row[keep].tolist() for row, keep in zip(ids, mask[:, -ids.shape[1] :], strict=True)]


class _HeldBack(BaseStreamer):
    """Holds tokens back from a streamer until it is decided whether they may be shown."""

    def __init__(self, streamer: BaseStreamer, processor: _GuardedCall) -> None:
        self.streamer, self.processor = streamer, processor
        self.held: list[Tensor] | None = []  # None: decided
        self.is_refused = False

    def put(self, value: Tensor) -> None:
        if self.held is not None and self.processor.is_complete:
            self._release()
        if self.held is not None and self.processor.energies:
            self.held.append(value)
        elif not self.is_refused:
            self.streamer.put(value)

    def end(self) -> None:
        if self.held is not None:
            self._release()
        self.streamer.end()

    def _release(self) -> None:
        self.is_refused = bool(self.processor.decide().any())
        ids = self.processor.guard.refusal_ids[: self.processor.new_tokens]
        for value in [torch.tensor([token]) for token in ids] if self.is_refused else self.held or []:
            self.streamer.put(value)
        self.held = None

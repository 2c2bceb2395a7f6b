"""The guard, which refuses prompts whose energy exceeds a calibrated threshold, inside plain ``model.generate``.

The refusal rule is this project's own (method.md §5); the paper does not specify one in detail.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eua.data.dates import at_same_date
from eua.data.rows import encode_answer, encode_prompts
from eua.data.sources import Prompts, read_prompts
from eua.errors import EUAError
from eua.files import write_json
from eua.guard.checks import (
    FIELDS,
    check_not_forgotten,
    check_present_and_precise,
    check_probe,
    check_settings,
    check_unseen,
    without_copies,
)
from eua.guard.guarded_generate import GuardHandle
from eua.guard.hub import MissingFileError, find_file, send_file
from eua.guard.questions import Turns
from eua.guard.scores import answer_scores, prompt_scores
from eua.model.fingerprints import model_fingerprint, recent_fingerprint, tokenizer_fingerprint
from eua.statistics import check_calibration, conformal_threshold

GUARD_FILE = "energy_guard.json"
DEFAULT_REFUSAL = "I cannot help with that question."


@dataclass(frozen=True)
class EnergyGuard:
    """Refuses prompts whose score exceeds ``threshold``.

    The score is the energy at the prompt's last token. With ``first_tokens`` it is the mean over that token and the first
    generated tokens, up to that number or to the end of the answer.

    In a chat, the guard scores the user's last turn alone, up to where the assistant's turn begins. So earlier turns, a system
    prompt or an answer begun by the caller cannot unlock what would be refused without them, and the promise holds whatever
    they are. If the calibration prompts include chats, that turn is also scored in its context, and the higher score counts.

    With a probe, the refusal ends an answer midway if the mean energy of ``probe_window`` successive tokens exceeds
    ``probe_threshold``.

    Attributes:
        threshold: in nats.
        temperature: T of the energy.
        refusal_text: text that a refused prompt gets.
        refusal_ids: token ids of this text, with the end-of-sequence token at the end.
        stop_ids: the same, tokenized as the continuation of an answer that the probe stops.
        tolerance: ε, the rate of false refusals that the threshold was calibrated for.
        calibration_prompts: number of held-out prompts in the calibration.
        calibration_groups: number of groups among these prompts, or None if they were not grouped.
        first_tokens: number of generated tokens that the score includes.
        turns: how the tokenizer's template writes turns; None if they cannot be read from it.
        probe_window: number of successive tokens in the probe's mean; 0: no probe.
        probe_tokens: maximal length of the answers that the probe was calibrated on.
        probe_threshold: in nats.
        confidence: 1 − δ, the confidence that the rate is at most ε with this calibration; None: it is so on average.
        model_fingerprint, tokenizer_fingerprint: of the model and tokenizer in the calibration, see
            :mod:`eua.model.fingerprints`. None: any will do, which only a guard that was not saved may say.
        dtype: of the model in the calibration, e.g. ``"bfloat16"``; None: any, likewise.

    Raises:
        EUAError: for a value that a field cannot have.
    """

    threshold: float
    temperature: float
    refusal_text: str
    refusal_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    tolerance: float
    calibration_prompts: int
    calibration_groups: int | None = None
    first_tokens: int = 0
    turns: Turns | None = None
    probe_window: int = 0
    probe_tokens: int = 0
    probe_threshold: float | None = None
    confidence: float | None = None
    model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.first_tokens, self.probe_window, self.probe_tokens)
        for name, rule, is_allowed in FIELDS:
            if not is_allowed(getattr(self, name)):
                raise EUAError(f"The guard's {name} is {getattr(self, name)!r}, but must be {rule}: calibrate the guard again.")
        if (self.probe_threshold is None) != (self.probe_window == 0):
            raise EUAError(
                f"probe_window = {self.probe_window} and probe_threshold = {self.probe_threshold}, but a probe needs both: "
                "calibrate the guard again."
            )

    @classmethod
    def calibrate(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        *,
        groups: Iterable[Hashable] | None = None,
        tolerance: float = 0.05,
        confidence: float | None = None,
        seen: Prompts | None = None,
        first_tokens: int = 0,
        probe_window: int = 0,
        probe_tokens: int = 64,
        temperature: float = 1.0,
        refusal_text: str = DEFAULT_REFUSAL,
        batch_size: int = 32,
        progress: bool = False,
        on_scores: Callable[[Tensor], None] | None = None,
    ) -> EnergyGuard:
        """Set the threshold by split conformal: P(false refusal) ≤ ``tolerance`` for prompts exchangeable with these.

        Args:
            model: the model that will be deployed, after quantization. The guarantee holds for it alone.
            tokenizer: its tokenizer, with the chat template that will be used.
            prompts: retained prompts that unlearning has not seen: a file, the name of a data set or any other source of
                :mod:`eua.data.sources`, or a list of questions and rows. 5 % takes at least 19 prompts. If they include chats
                with several turns or system prompts, the guard also scores in context. Prompts with the same tokens say no
                more than one of them: without groups, copies are left out; groups that share a prompt count as one.
            groups: whom or what each prompt is about, with one entry per prompt. Several prompts about one person resemble each
                other; with groups, the promise holds for new people, not just for new prompts. 5 % takes at least 19 groups.
            tolerance: ε, the tolerated rate of false refusals.
            confidence: 1 − δ. Without it, the rate is at most ε on average over calibration sets; with it, also for this
                calibration set, with probability 1 − δ. ε = δ = 5 % takes 59 prompts or groups.
            seen: rows that unlearning was trained on, from the same sources; ``prompts`` must contain none of them.
            first_tokens: number of generated tokens that the score includes. More of them separate forgotten prompts from
                retained ones better, but a refusal takes this number of additional steps, and streams hold this number of
                tokens back. Calibration generates them greedily, so the promise is for greedy generation.
            probe_window: watch answers as they are generated, and stop an answer if the mean energy of this number of
                successive tokens exceeds a threshold, which at most a share ``tolerance`` of the answers to new prompts
                exceed. 0: do not watch.
            probe_tokens: length of the answers that are generated, greedily, to calibrate the probe.
            temperature: T of the energy, as in training.
            refusal_text: text that a refused prompt gets.
            batch_size: prompts per forward pass.
            progress: show a progress bar.
            on_scores: called with the scores of the prompts that count, (P,) float32, in nats, in their order.

        Raises:
            EUAError: if prompts cannot be read, are too few or were trained on, if there is not one group per prompt, if the
                model or tokenizer cannot be guarded, or if hidden states contain NaN.

        >>> guard = EnergyGuard.calibrate(                                     # doctest: +SKIP
        ...     model, tokenizer, "held_out.jsonl", seen="retain.jsonl"
        ... )
        >>> guard.save_pretrained("unlearned")                                 # doctest: +SKIP
        """
        check_settings(temperature, first_tokens, probe_window, probe_tokens)
        if probe_window > probe_tokens:
            raise EUAError(
                f"probe_window = {probe_window}, but answers of probe_tokens = {probe_tokens} have no window of that length: "
                "raise probe_tokens, or choose a smaller probe_window."
            )
        if isinstance(prompts, (list, tuple)) and not prompts:
            raise EUAError("There are no calibration prompts: give held-out prompts that must be answered, at least 19 at 5 %.")
        refusal_ids, stop_ids = _refusal_ids(refusal_text, tokenizer)
        prompts = read_prompts(prompts, "calibration prompts")
        ids = encode_prompts(prompts, tokenizer, "calibration prompts")
        if seen is not None and not (isinstance(seen, (list, tuple)) and not seen):
            check_unseen(ids, encode_prompts(read_prompts(seen, "seen prompts"), tokenizer, "seen prompts"))
        without_date = at_same_date(tokenizer)
        check_not_forgotten(ids if without_date is tokenizer else encode_prompts(prompts, without_date), model)
        check_present_and_precise(model)
        ids, groups = without_copies(ids, groups)
        check_calibration(len(ids), tolerance, groups, confidence)  # before minutes of scoring
        turns = Turns.of(tokenizer)
        turns = turns and turns.for_prompts(ids)
        settings: dict[str, Any] = {"temperature": temperature, "batch_size": batch_size}
        title = "scores of calibration prompts" if progress else None
        scores = prompt_scores(model, ids, first_tokens=first_tokens, turns=turns, progress=title, **settings)
        if on_scores is not None:
            on_scores(scores)
        probe_threshold = None
        if probe_window:
            title = "answers to calibration prompts" if progress else None
            means = answer_scores(model, ids, window=probe_window, new_tokens=probe_tokens, progress=title, **settings)
            probe_threshold = conformal_threshold(means, tolerance, groups, confidence)
            check_probe(probe_threshold, probe_window, probe_tokens)
        return cls(
            threshold=conformal_threshold(scores, tolerance, groups, confidence),
            temperature=temperature,
            refusal_text=refusal_text,
            refusal_ids=refusal_ids,
            stop_ids=stop_ids,
            tolerance=tolerance,
            calibration_prompts=len(scores),
            calibration_groups=None if groups is None else len(set(groups)),
            first_tokens=first_tokens,
            turns=turns,
            probe_window=probe_window,
            probe_tokens=probe_tokens if probe_window else 0,
            probe_threshold=probe_threshold,
            confidence=confidence,
            model_fingerprint=model_fingerprint(model),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            dtype=_dtype_of(model),
        )

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, thorough: bool = True) -> None:
        """Raise :class:`EUAError` for another model, tokenizer or dtype than in the calibration.

        Models and tokenizers are compared by their fingerprints, see :mod:`eua.model.fingerprints`.

        Unless ``thorough``, all weights are read only if there is a sign that they have changed since they were last read.
        """
        check_present_and_precise(model)
        if self.dtype not in (None, _dtype_of(model)):
            raise EUAError(
                f"The guard was calibrated in {self.dtype}, but the model is in {_dtype_of(model)}, where energies differ by "
                f"up to tenths of a nat: load the model with dtype={self.dtype!r}, or calibrate the guard again for this model."
            )
        fingerprint_of = model_fingerprint if thorough else recent_fingerprint
        if self.model_fingerprint is not None and self.model_fingerprint != fingerprint_of(model):
            raise EUAError(
                "The guard was calibrated for other weights than this model's (it may have been trained, merged, quantized or "
                "cast since), so its threshold promises nothing here: calibrate it again for this model."
            )
        if tokenizer is not None and self.tokenizer_fingerprint not in (None, tokenizer_fingerprint(tokenizer)):
            raise EUAError(
                "The guard was calibrated with another tokenizer or chat template, which turns prompts into other tokens: "
                "use that one, or calibrate the guard again."
            )

    def with_refusal(self, text: str, tokenizer: PreTrainedTokenizerBase) -> EnergyGuard:
        """The same guard with another refusal text."""
        refusal_ids, stop_ids = _refusal_ids(text, tokenizer)
        return replace(self, refusal_text=text, refusal_ids=refusal_ids, stop_ids=stop_ids)

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, batch_size: int = 32
    ) -> Tensor:
        """The score of each prompt, (P,) float32, in nats. Prompts above ``threshold`` would be refused.

        >>> guard.score(model, tokenizer, "Where was Ann born?") > guard.threshold     # doctest: +SKIP
        tensor([True])

        Args:
            model, tokenizer: those that the guard was calibrated for.
            prompts: one question, or a list of questions and rows. A ``Path`` or any other source of :mod:`eua.data.sources`
                stands for the prompts of its rows.
            batch_size: prompts per forward pass.

        Raises:
            EUAError: if prompts cannot be read, or for another model or tokenizer, see :meth:`check`.
        """
        self.check(model, tokenizer, thorough=False)
        return self.score_ids(model, encode_prompts(prompts, tokenizer), batch_size, check=True)

    def score_ids(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int = 32, *, check: bool = False
    ) -> Tensor:
        """Like :meth:`score`, for token ids and without checking the model and tokenizer, see :func:`prompt_scores`."""
        return prompt_scores(
            model,
            prompts,
            temperature=self.temperature,
            first_tokens=self.first_tokens,
            turns=self.turns,
            batch_size=batch_size,
            check=check,
        )

    def refuses(self, scores: Tensor) -> Tensor:
        """Which scores are refused: (P,) in nats → (P,) bool. A score that is not a number is.

        >>> guard.refuses(torch.tensor([guard.threshold, torch.inf, torch.nan]))      # doctest: +SKIP
        tensor([False, True, True])
        """
        return ~(scores <= self.threshold)

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> GuardHandle:
        """Guard ``model.generate`` until the handle is detached. The handle is also a context manager.

        Reads every weight, as :meth:`check` does; with ``tokenizer``, that is checked, too.

        >>> with guard.attach(model) as handle:          # doctest: +SKIP
        ...     output = model.generate(**batch)         # flagged rows get the refusal text, others are unchanged
        ...     handle.refused                           # (B,) bool, of the last call
        """
        return GuardHandle(self, model, tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``energy_guard.json`` to ``folder``, usually the model's."""
        write_json(Path(folder) / GUARD_FILE, asdict(self) | {"promise": self.promise})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload ``energy_guard.json``, and nothing else, to a repository on the Hugging Face Hub, usually the model's.

        >>> guard.push_to_hub("org/model-unlearned")                           # doctest: +SKIP
        >>> EnergyGuard.from_pretrained("org/model-unlearned") == guard        # doctest: +SKIP
        True

        Args:
            repo_id: the repository; created if it does not exist.
            revision: the branch to commit to; created if it does not exist.
            commit_message: of the commit (default: "Upload energy_guard.json").
            private: whether a new repository is private.
            token: of the hub (default: that of ``hf auth login``).
            create_pr: open a pull request instead of committing.

        Returns:
            The hub's description of the commit, e.g. its ``commit_url``.

        Raises:
            EUAError: if the name cannot be a repository's, or if the hub does not accept the upload.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return send_file(
                Path(folder) / GUARD_FILE,
                repo_id,
                revision=revision,
                commit_message=commit_message or f"Upload {GUARD_FILE}",
                private=private,
                token=token,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> EnergyGuard:
        """Read what :meth:`save_pretrained` wrote or :meth:`push_to_hub` uploaded.

        >>> guard = EnergyGuard.from_pretrained("org/model-unlearned")          # doctest: +SKIP

        Args:
            pretrained_model_name_or_path: a folder or, if no folder has that name, a repository on the Hugging Face Hub. A
                ``Path`` is always a folder.
            revision, subfolder, token, cache_dir, force_download, local_files_only: as in transformers. For a folder, only
                ``subfolder`` has an effect.

        Raises:
            EUAError: if there is no such folder or repository, if it contains no guard, if the hub cannot be reached, or if the
                file is not a guard.
        """
        try:
            path = find_file(
                pretrained_model_name_or_path,
                GUARD_FILE,
                revision=revision,
                subfolder=subfolder,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        except MissingFileError as error:
            raise MissingFileError(f"{error}: calibrate a guard for this model first (`eua calibrate`).") from error
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("promise", None)
            read = {name: tuple(content[name]) for name in ("refusal_ids", "stop_ids")}
            guard = cls(**content | read | {"turns": Turns.from_json(content.get("turns"))})
            missing = [name for name in ("model_fingerprint", "tokenizer_fingerprint", "dtype") if content.get(name) is None]
            if missing:
                raise EUAError(
                    f"The guard has no {' and no '.join(missing)}, so it would go with any model: calibrate the guard again."
                )
            return guard
        except EUAError as error:
            raise EUAError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EUAError(f"{path} is not a guard ({error!r}): calibrate it again.") from error

    @property
    def promise(self) -> str:
        """What the threshold guarantees, in words."""
        if self.calibration_groups is None:
            scope = f"a prompt exchangeable with the {self.calibration_prompts} calibration prompts"
        else:
            scope = (
                f"a prompt of a new group (exchangeable with the {self.calibration_groups} groups of the calibration prompts)"
            )
        how_sure = "" if self.confidence is None else f"With a confidence of {self.confidence:g} over the calibration prompts: "
        probed = ""
        if self.probe_threshold is not None:
            probed = (
                f"The same bound holds for the probability that its answer, generated greedily, is stopped within its first "
                f"{self.probe_tokens} tokens. "
            )
        return (
            f"{how_sure}The probability that {scope} is falsely refused is at most {self.tolerance:g}. {probed}"
            "This holds for the model, chat template and quantization that were calibrated. It says nothing about the share of "
            "forgotten prompts that are refused, which has to be measured."
        )


def find_guard(
    model: str | os.PathLike[str], guard: str | os.PathLike[str] | None = None, **options: Any
) -> EnergyGuard | None:
    """The guard that a command should use for a model: the named one, else the model's own, else None.

    None means that the model certainly has no guard: its folder, its repository or, offline, the downloaded part of that
    repository contains none. If that is not certain, it is an error, so that no model answers unguarded because of a bad
    connection.

    >>> find_guard("org/model-unlearned", revision="v2")                        # doctest: +SKIP

    Args:
        model: the model's folder or name on the hub.
        guard: folder or name on the hub of another guard, which then must exist.
        options: ``revision`` and other options of :meth:`EnergyGuard.from_pretrained`, for the place that is searched.

    Raises:
        EUAError: if ``guard`` contains no guard, if the file is not a guard, if there is no such repository, or if the hub
            cannot be reached.
    """
    if guard is not None:
        return EnergyGuard.from_pretrained(guard, **options)
    try:
        return EnergyGuard.from_pretrained(model, **options)
    except MissingFileError:
        return None


def _dtype_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _refusal_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the refusal as an answer, and as the continuation of one, each with the end-of-sequence token at the end."""
    if tokenizer.eos_token_id is None:
        raise EUAError("The tokenizer has no end-of-sequence token, so a refusal could not end: set tokenizer.eos_token.")
    ids, rest = encode_answer(text, tokenizer), encode_answer(text, tokenizer, begun="Well")
    if not text.strip() or len(ids) < 2:
        raise EUAError(f"The refusal text {text!r} has no tokens: give it some words.")
    return tuple(ids), tuple(rest)

"""Stand-ins for the parts of vLLM that eua.vllm needs, because tests run without vLLM: two interfaces and their runners.

The classes have the names, fields and abstract methods of vLLM 0.33.0 (``vllm/v1/sample/logits_processor/interface.py`` and
``vllm/v1/worker/gpu/sample/logits_processor/interface.py``). The runners report changes of the batch as vLLM's do: an added
request takes the lowest free row, the last rows move into rows that stay empty, and only then rows are swapped
(``BatchUpdateBuilder``, ``InputBatch.condense``). Both also compute logits of partly read prompts, which are not used.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LanguageModel = Callable[[list[int]], Tensor]  # tokens → (V,) logits of the next one


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, list[int] | None, list[int]]]
    moved: list[tuple[int, int, MoveDirectionality]]


class FirstInterface(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abstractmethod
    def apply(self, logits): ...

    @abstractmethod
    def is_argmax_invariant(self): ...

    @abstractmethod
    def update_state(self, batch_update): ...


class SecondInterface(ABC):
    def __init__(self, vllm_config, req_states):  # noqa: B027
        pass

    @classmethod  # noqa: B027
    def validate_params(cls, sampling_params):
        pass

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):  # noqa: B027
        pass

    @abstractmethod
    def apply(self, logits, ctx): ...


def install(monkeypatch, second_interface: bool = True) -> None:
    """Install the stand-in as ``vllm``; without the second interface it stands for a version before 0.31."""
    first = {"LogitsProcessor": FirstInterface, "BatchUpdate": BatchUpdate, "MoveDirectionality": MoveDirectionality}
    modules = {"vllm.v1.sample.logits_processor": first}
    if second_interface:
        modules["vllm.v1.worker.gpu.sample.logits_processor"] = {"LogitsProcessor": SecondInterface}
    for path, content in modules.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(content)


@dataclass(eq=False)
class Request:
    """``tokens`` is the scheduler's list, ``output_ids`` that of the first runner, with −1 for a token it waits for."""

    prompt: list[int]
    length: int  # of the output
    tokens: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    resumed_at: list[int] = field(default_factory=list)  # output lengths at which it came back after a preemption

    @property
    def read(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.length


class FirstRunner:
    """The persistent batch of ``gpu_model_runner.py``: each row is a request, and requests that are not scheduled leave it."""

    def __init__(self, processor_class, vllm_config, model: LanguageModel, random: Random, overlapped: bool) -> None:
        self.processor = processor_class(vllm_config, torch.device("cpu"), False)
        self.model, self.random, self.overlapped = model, random, overlapped
        self.rows: list[Request] = []

    def step(self, scheduled: dict[Request, int]) -> None:
        """Run the model on the given number of next tokens of each request."""
        self.processor.update_state(self._change_batch(scheduled))
        for request in self.rows:
            request.computed += scheduled[request]
            if -1 in request.output_ids:  # sampled in the previous step and known now
                request.output_ids[:] = request.tokens
        logits = torch.stack([self.model(request.read[: request.computed]) for request in self.rows])
        sampled = self.processor.apply(logits).argmax(dim=-1).tolist()
        for request, token in zip(self.rows, sampled, strict=True):
            if request.computed == len(request.read):
                request.tokens.append(token)
                request.output_ids.append(-1 if self.overlapped else token)

    def _change_batch(self, scheduled: dict[Request, int]) -> BatchUpdate | None:
        rows: list[Request | None] = list(self.rows)
        empty = [index for index, request in enumerate(self.rows) if request not in scheduled]
        empty.sort(reverse=True)
        for index in empty:
            rows[index] = None
        added, moved = [], []
        for request in scheduled:
            if request in self.rows:
                continue
            if self.overlapped and request.tokens:
                request.output_ids = list(request.tokens)
            index = empty.pop() if empty else len(rows)
            rows[index : index + 1] = [request]
            added.append((index, SimpleNamespace(), request.prompt, request.output_ids))
        last = len(rows) - 1
        while empty:
            while last in empty:
                last -= 1
            if empty[-1] >= last:
                break
            target = empty.pop()
            rows[target], rows[last] = rows[last], None
            moved.append((last, target, MoveDirectionality.UNIDIRECTIONAL))
            last -= 1
        self.rows = [request for request in rows if request is not None]
        if len(self.rows) > 1 and self.random.random() < 0.3:
            one, other = self.random.sample(range(len(self.rows)), 2)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        return BatchUpdate(len(self.rows), empty, added, moved) if empty or added or moved else None


class SecondRunner:
    """The slots of ``gpu/model_runner.py``: a request keeps its slot until it ends or is preempted; rows come in any order."""

    def __init__(self, processor_class, vllm_config, model: LanguageModel, random: Random, overlapped: bool) -> None:
        size = vllm_config.scheduler_config.max_num_seqs
        host = {name: np.zeros(size, dtype=np.int32) for name in ("prompt_len", "prefill_len")}
        self.tokens = torch.full((size, 64), 99, dtype=torch.int32)
        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=size,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            **{name: SimpleNamespace(np=values, gpu=torch.from_numpy(values)) for name, values in host.items()},
        )
        self.processor = processor_class(vllm_config, self.states)
        self.model, self.random = model, random
        self.free = list(range(size))
        self.slots: dict[Request, int] = {}

    def step(self, scheduled: dict[Request, int]) -> None:
        """Run the model on the given number of next tokens of each request."""
        for request in [request for request in self.slots if request.finished or request.computed == 0]:
            self.free.append(self.slots.pop(request))
        for request in scheduled:
            if request not in self.slots:
                self.slots[request] = slot = self.free.pop()
                self.states.prompt_len.np[slot] = len(request.prompt)
                self.states.prefill_len.np[slot] = len(request.read)
                self.tokens[slot, : len(request.read)] = torch.tensor(request.read, dtype=torch.int32)
                self.processor.add_request(slot, SimpleNamespace())
        self.processor.apply_staged_writes()

        batch = self.random.sample(list(scheduled), len(scheduled))
        for request in batch:
            request.computed += scheduled[request]
        slots = np.array([self.slots[request] for request in batch], dtype=np.int32)
        lengths = np.array([request.computed for request in batch], dtype=np.int32)
        context = SimpleNamespace(
            expanded_idx_mapping=torch.from_numpy(slots),
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            pos=torch.from_numpy(lengths).long() - 1,
            seq_lens_upper_bound_np=np.pad(lengths, (0, 2)),
        )
        logits = torch.stack([self.model(request.read[: request.computed]) for request in batch])
        sampled = self.processor.apply(logits, context).argmax(dim=-1).tolist()
        for request, token in zip(batch, sampled, strict=True):
            if request.computed == len(request.read):
                self.tokens[self.slots[request], len(request.read)] = token
                request.tokens.append(token)


def serve(runner: FirstRunner | SecondRunner, requests: list[Request], random: Random, size: int) -> None:
    """Schedule until all are answered. Prompts are read in parts, requests preempted and, in the first runner, skipped."""
    waiting, running = list(requests), []
    while waiting or running:
        for request in list(running):
            if random.random() < 0.12:  # preempted: everything computed is lost
                running.remove(request)
                waiting.append(request)
                request.computed = 0
                request.resumed_at.append(len(request.tokens))
        while waiting and len(running) < size and random.random() < 0.6:
            running.append(waiting.pop(random.randrange(len(waiting))))
        left_out = 0.1 if isinstance(runner, FirstRunner) else 0.0
        scheduled = {
            request: random.randint(1, min(3, len(request.read) - request.computed))
            for request in running
            if random.random() >= left_out
        }
        if scheduled:
            runner.step(scheduled)
        running = [request for request in running if not request.finished]

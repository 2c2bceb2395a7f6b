"""All checks and benchmarks that need a GPU, in two commands that end in five and in seven minutes; they need torch and triton.

    python benches/gpu.py probe      # are the kernels right; what could they become; their fastest tiles
    python benches/gpu.py benchmark  # times and memory compared with peers, for the heads of four models; further checks

Kernels are compiled in many processes at once. After every case the results so far are written to the folder that ``--out``
or the environment variable OUT names (``benches/results`` without either), so that a kill loses nothing. Every part has a share
of the time; a case that fails is recorded and does not end the rest. ``benchmark`` runs with the tiles that ``probe`` found
fastest, if its results are in ``benches/results``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Runs from a checkout that was not installed, also in the processes that it starts.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import correctness
import measure
import torch
from heads import CACHE, TRAINABLE, WHATS, Head, random_head, trained_head
from peers import Peer, ours, peers
from report import RESULTS, Report

from fused_energy.triton import configs

PROCESSES = 12  # each holds a context and the tensors of one case on the GPU
ROUNDS = 5
TRITON = Peer("triton", partial(ours, "triton"))
MIB = 2**20
SMOKE = 12  # correctness cases that come first


class Shape(NamedTuple):
    model: str
    hidden_size: int
    vocabulary: int
    softcap: float | None = None
    trained: bool = False  # also measure hidden states of a trained model

    def name(self, tokens: int) -> str:
        cap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        return f"{self.model}: N, H, V = {tokens}, {self.hidden_size}, {self.vocabulary}{cap}, bfloat16"


TOKENS = 8192
SHAPES = [
    Shape("Llama-3.1-8B", 4096, 128256, trained=True),
    Shape("Gemma-2-2B", 2304, 256000, softcap=30.0, trained=True),
    Shape("Qwen2.5-7B", 3584, 152064),
    Shape("Llama-3.2-1B", 2048, 128256),
]


class Run:
    """The device, the report, and the clock."""

    def __init__(self, command: str, out: Path, limit: float, rehearse: bool) -> None:
        self.began, self.limit = time.monotonic(), limit
        self.device, self.rehearse = ("cpu", True) if rehearse else ("cuda", False)
        self.tokens = 8 if rehearse else TOKENS
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.shapes = [Shape("rehearsal", 16, 70, trained=True), Shape("second", 16, 40)] if rehearse else SHAPES
        self.gpu = "rehearsal" if rehearse else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
        self.report = Report(f"{command}-{self.gpu}", f"python benches/gpu.py {command}", self.device, out)
        self.until = self.began + limit

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.until

    def note(self, text: str) -> None:
        self.say(text)
        self.report.notes.append(text)
        self.report.write()

    def add(self, title: str, row: str, column: str, value: float | str) -> None:
        self.report.add(title, row, column, value)
        self.report.write()

    def head(self, shape: Shape, make: Callable[..., Head] = random_head, tokens: int | None = None) -> Head:
        return make(tokens or self.tokens, shape.hidden_size, shape.vocabulary, self.dtype, self.device)

    def in_processes(self, work: Callable[..., Any], cases: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Each case and what ``work(*case)`` returns, or its error, as they come; the rest is killed."""
        waiting = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2 if self.rehearse else PROCESSES, mp_context=waiting) as pool:
            futures = {pool.submit(work, *case): case for case in cases}
            try:
                for done in as_completed(futures, timeout=max(0.0, self.until - time.monotonic())):
                    error = done.exception()
                    case = futures.pop(done)
                    yield case, done.result() if error is None else f"{type(error).__name__}: {error}".splitlines()[0][:200]
            except TimeoutError:
                self.note(f"out of time: {len(futures)} cases of {work.__name__} were not reached")
                for process in list((pool._processes or {}).values()):
                    process.kill()


def check(run: Run, cases: list[correctness.Case]) -> None:
    """Correctness cases, each with the worst error in multiples of that of plain PyTorch."""
    wrong = reached = 0
    for (case, _), result in run.in_processes(correctness.check, [(case, run.device) for case in cases]):
        reached += 1
        worst, failures = (float("nan"), [f"{case}: {result}"]) if isinstance(result, str) else result
        run.add("Worst error / that of plain PyTorch", f"{case.shape}, {str(case.dtype)[6:]}", case.options, worst)
        for failure in failures:
            wrong += 1
            run.note(f"WRONG: {failure}")
    run.note(f"correctness: {wrong} failures in {reached} of {len(cases)} cases")


def smoke(run: Run) -> None:
    """The first dozen of correctness cases, and that nothing leaks from tokens that are left out."""
    check(run, correctness.cases(run.rehearse)[:SMOKE])
    for failure in correctness.leaks(run.device, run.rehearse):
        run.note(f"WRONG: {failure}")


def rest_of_correctness(run: Run) -> None:
    check(run, correctness.cases(run.rehearse)[SMOKE:])


def probe(run: Run) -> None:
    """The prototypes of ``candidates.py`` in multiples of the matmul, for one wide and one narrow head and for few tokens."""
    from candidates import Chunk, backward_candidates, forward_candidates, kept_candidates

    half, single = run.dtype, torch.float32
    forward = [Chunk(8192, 1056, single), Chunk(2048, 8448, single), Chunk(8192, 1536, half), Chunk(4096, 4224, half)]
    backward = [Chunk(8192, 8448, half), Chunk(8192, 4224, half), Chunk(4096, 4224, half), Chunk(4096, 4224, single)]
    few = [Chunk(512, 16896, single), Chunk(512, 33792, half)]
    block = 1024
    if run.rehearse:
        forward, backward, few, block = [Chunk(4, 32, single)], [Chunk(8, 32, single)], [], 32

    def candidates(head: Head, wide: bool) -> Iterator[Any]:
        yield from forward_candidates(head, forward, block)
        if wide:
            yield from backward_candidates(head, backward, block)
            yield from kept_candidates(head, 32 if run.rehearse else 4096)

    first, last = run.shapes[0], run.shapes[-1]
    for shape, tokens in ((first, run.tokens), (last, run.tokens), (first, 8 if run.rehearse else 512)):
        head = run.head(shape, tokens=tokens)
        title = f"Prototypes, time / matmul, {shape.name(tokens)}"
        own = backward_candidates(head, few, block) if tokens < TOKENS and few else candidates(head, shape is first)
        truth = -torch.logsumexp(head.hidden[:64].double() @ head.weight.double().T, dim=-1)
        seconds = measure.medians({"matmul": head.matmul}, run.device, ROUNDS)["matmul"]
        flops = 2.0 * head.hidden.numel() * len(head.weight)
        run.add("Matmul, TFLOP/s", shape.name(tokens), "", 1e-12 * flops / seconds)
        for what in WHATS:
            time_of(run, head, title, f"today's kernels: {what}", head.step(TRITON.run, what)[0])
        for candidate in own:
            if run.out_of_time():
                run.note("probe: out of time")
                return
            time_of(run, head, title, candidate.name, candidate.step)
            if candidate.energies is not None:
                run.add(title, candidate.name, "largest error, nats", float((candidate.energies()[:64] - truth).abs().max()))


def time_of(run: Run, head: Head, title: str, name: str, step: Callable[[], Any]) -> None:
    try:
        times = measure.medians({"matmul": head.matmul, name: step}, run.device, ROUNDS)
        run.add(title, name, "time / matmul", times[name] / times["matmul"])
        run.add(title, name, "ms", times[name] * 1e3)
        run.say(f"{name}: {times[name] / times['matmul']:.3f} × matmul, {times[name] * 1e3:.3f} ms")
    except Exception as error:  # a prototype that fails must not end the rest
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        run.add(title, name, "time / matmul", reason)
        run.say(f"{name}: {reason}")


def tune(run: Run) -> None:
    """The fastest tiles of the forward on the first shape, which ``benchmark`` reads; and what more scratch would gain."""
    from tuning import scratch_sizes, tables, tune_forward

    head = run.head(run.shapes[0])
    for name, table in tables(run.rehearse).items():
        key = "TINY" if run.rehearse else configs.kind(head.hidden.device)
        found = tune_forward(head, name, table, key, run.out_of_time, run.rehearse, run.say)
        for field, value in found._asdict().items():
            run.add(f"Fastest tile of {name}", key, field, value)
    for size, what, ratio in scratch_sizes(head, run.rehearse):
        run.add("Time / matmul, by memory for chunks of logits", what, size, ratio)
        if run.out_of_time():
            break


def use_tuned(run: Run) -> None:
    """Run with the tiles that ``probe`` found on this GPU, if its results are there."""
    from tuning import tables

    path = RESULTS / f"probe-{run.gpu}.json"
    if run.rehearse or not path.exists():
        return
    found = json.loads(path.read_text())["tables"]
    for name in tables(rehearse=False):
        for key, row in found.get(f"Fastest tile of {name}", {}).items():
            getattr(configs, name)[key] = configs.Config(**row)
            run.note(f"{name} with the tile of {path.name}: {row}")


def compile_peers(run: Run) -> None:
    """Run everything that compiles once for each of the first two shapes, so that the benchmark finds it compiled."""
    names = [peer.name for peer in peers(run.device) if peer.run and peer.name not in ("reference", "streaming", "plain")]
    shapes = [] if run.rehearse else run.shapes[:2]
    for (shape, name, *_), result in run.in_processes(_compile, [(s, n, run.tokens, run.dtype) for s in shapes for n in names]):
        run.say(f"compiled {name} for {shape.model}: {result}")


def _compile(shape: Shape, name: str, tokens: int, dtype: torch.dtype) -> str:
    (peer,) = (peer for peer in peers("cuda", shape.softcap) if peer.name == name)
    if peer.run is None:
        return peer.reason
    began, head = time.monotonic(), random_head(tokens, shape.hidden_size, shape.vocabulary, dtype, "cuda")
    for what in WHATS:
        head.step(peer.run, what, shape.softcap)[0]()
    torch.cuda.synchronize()
    return f"{time.monotonic() - began:.0f} s"


def benchmark_first(run: Run) -> None:
    """The two most important shapes, random and trained states."""
    benchmark(run, run.shapes[:2])


def benchmark_rest(run: Run) -> None:
    benchmark(run, run.shapes[2:])


def benchmark(run: Run, shapes: list[Shape]) -> None:
    """For each shape our implementations first, then the peers."""
    for shape in shapes:
        for states, make in (("random", random_head), ("trained", trained_head)):
            if states == "trained" and not shape.trained:
                continue
            if run.out_of_time():
                run.note(f"benchmark: out of time before {shape.model}, {states}")
                return
            head = run.head(shape, make)
            title = f"{shape.name(run.tokens)}, {states} hidden states"
            run.say(title)
            run.add("Mean entropy of the softmax, nats", shape.model, states, head.entropy())
            compare(run, head, shape, title)
            if states == "random" and shape is run.shapes[0]:
                active_share(run, head, shape)
            del head
            if run.device == "cuda":
                torch.cuda.empty_cache()


def compare(run: Run, head: Head, shape: Shape, title: str) -> None:
    everyone = peers(run.device, shape.softcap)
    if run.rehearse:  # in the interpreter
        everyone = [peer for peer in everyone if peer.name != "triton"] + [TRITON]
    for peer in sorted(everyone, key=lambda peer: peer.name not in ("triton", "streaming")):
        for what in WHATS:
            if run.out_of_time():
                run.note(f"benchmark: out of time at {peer.name}, {title}")
                return
            tables = [f"{x}: {title}" for x in ("Time / matmul", "ms", "Share of the matmul's rate", "Peak MiB")]
            if peer.run is None:
                run.add(tables[0], peer.name, what, peer.reason)
                continue
            step, leaves = head.step(peer.run, what, shape.softcap)
            try:
                times = measure.medians({"matmul": head.matmul, peer.name: step}, run.device, ROUNDS)
            except Exception as error:  # a peer that fails must not end the run
                run.add(tables[0], peer.name, what, f"{type(error).__name__}: {error}".splitlines()[0][:120])
                continue
            # The unavoidable products are 1, 2 and 3. (Ours takes 4 for a trainable head, as it computes logits twice.)
            matmuls = WHATS.index(what) + 1
            run.add(tables[0], peer.name, what, times[peer.name] / times["matmul"])
            run.add(tables[1], peer.name, what, times[peer.name] * 1e3)
            run.add(tables[1], f"(matmul timed with {peer.name})", what, times["matmul"] * 1e3)
            run.add(tables[2], peer.name, what, matmuls * times["matmul"] / times[peer.name])
            try:
                peak: float | str = measure.peak_bytes(step, leaves, run.device) / MIB
            except Exception as error:  # the times are valid without it
                peak = type(error).__name__
            run.add(tables[3], peer.name, what, peak)
            ratio, milliseconds = times[peer.name] / times["matmul"], times[peer.name] * 1e3
            run.say(f"{peer.name}, {what}: {ratio:.2f} × matmul, {milliseconds:.2f} ms, peak MiB {peak}")


def active_share(run: Run, head: Head, shape: Shape) -> None:
    """Time against the share of tokens that have a target."""
    for share in (1.0, 0.5, 0.1, 0.0):
        targets = head.targets.where(torch.rand(run.tokens, device=run.device) < share, -100)
        step, _ = head._replace(targets=targets).step(TRITON.run, TRAINABLE, shape.softcap)
        times = measure.medians({"matmul": head.matmul, "triton": step}, run.device, ROUNDS)
        title = f"Time of triton / matmul of all tokens, by share of active tokens: {TRAINABLE}"
        run.add(title, shape.name(run.tokens), f"{share:.0%}".rjust(6), times["triton"] / times["matmul"])


def memory_is_measured(run: Run) -> None:
    measure.check(run.device)


# The parts of each command, and the second of the command's time at which a part must have ended.
COMMANDS: dict[str, tuple[float, list[tuple[Callable[[Run], Any], float]]]] = {
    "probe": (300.0, [(smoke, 60.0), (probe, 170.0), (tune, 290.0)]),
    "benchmark": (
        400.0,
        [
            (memory_is_measured, 20.0),
            (use_tuned, 20.0),
            (compile_peers, 100.0),
            (benchmark_first, 250.0),
            (rest_of_correctness, 310.0),
            (benchmark_rest, 390.0),
        ],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)), help="folder of the results")
    parser.add_argument("--limit", type=float, help="seconds, if the default of the command is too long")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # tiny, in the interpreter, to find bugs
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("No GPU was found, but this script needs one: on a CPU, run pytest benches --benchmark-only.")
        return 2
    usual, parts = COMMANDS[arguments.command]
    limit = arguments.limit or usual
    out = CACHE if arguments.rehearse and arguments.out == RESULTS else arguments.out  # figures that are not worth keeping
    run = Run(arguments.command, out, limit, arguments.rehearse)
    for part, ends in parts:
        run.until = run.began + ends * limit / usual
        run.say(f"--- {part.__name__}, until {ends * limit / usual:.0f} s")
        try:
            part(run)
        except Exception as error:  # the other parts are still useful
            run.note(f"{part.__name__} ended with {type(error).__name__}: {error}")
        run.report.write()
    print(f"\n{run.report}\n\nWritten to {run.report.path}.")
    return 1 if any(note.startswith("WRONG") or " ended with " in note for note in run.report.notes) else 0


if __name__ == "__main__":
    raise SystemExit(main())

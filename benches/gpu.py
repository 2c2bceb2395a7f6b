"""All checks and benchmarks that need a GPU, in one command of less than nine minutes; needs only torch and triton.

    python benches/gpu.py [--only correctness tuning benchmark]

1. correctness: Triton on float16, bfloat16 and float32 against float64;
2. benchmark: time, share of the matmul's rate, and peak memory for the heads of four models, compared with peers that run;
3. tuning: the fastest launch settings, as a literal for ``fused_energy/triton/configs.py``.

Each part has a time budget; it reports what did not fit. The results so far are written to
``benches/results/energy-<gpu>.json`` after every step, so that a kill loses nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that was not installed

import correctness
import measure
import torch
from heads import CACHE, TRAINABLE, WHATS, Head, random_head, trained_head
from peers import Peer, ours, peers
from report import Report

BUDGETS = {"correctness": 90.0, "benchmark": 270.0, "tuning": 140.0}  # seconds
ROUNDS = 5
TRITON = Peer("triton", partial(ours, "triton"))
MIB = 2**20


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
    Shape("Gemma-2-2B", 2304, 256000, softcap=30.0),
    Shape("Llama-3.2-1B", 2048, 128256),
    Shape("Qwen2.5-7B", 3584, 152064),
]


class Run:
    """The device, the report, and the clock."""

    def __init__(self, rehearse: bool, command: str) -> None:
        self.device, self.rehearse = ("cpu", True) if rehearse else ("cuda", False)
        self.tokens = 8 if rehearse else TOKENS
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.shapes = [Shape("rehearsal", 16, 70, trained=True)] if rehearse else SHAPES
        if rehearse:  # its figures are not worth keeping
            self.report = Report("rehearsal", command, self.device, CACHE)
        else:
            gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
            self.report = Report(f"energy-{gpu}", command, self.device)
        self.began = self.until = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.until

    def note(self, text: str) -> None:
        self.say(text)
        self.report.notes.append(text)
        self.report.write()


def check(run: Run) -> None:
    """Part 1: correctness."""
    wrong = 0
    for failure in correctness.failures(run.device, run.rehearse, run.say):
        wrong += 1
        run.note(f"WRONG: {failure}")
        if run.out_of_time():
            run.note("correctness: out of time")
            break
    run.note(f"correctness: {wrong} failures")


def benchmark(run: Run) -> None:
    """Part 2: the shapes, most important first; for each, our implementations first, then the peers."""
    for shape in run.shapes:
        for states, make in (("random", random_head), ("trained", trained_head)):
            if run.out_of_time() or (states == "trained" and not shape.trained):
                continue
            head = make(run.tokens, shape.hidden_size, shape.vocabulary, run.dtype, run.device)
            entropy = f"mean entropy of the softmax {head.entropy():.1f} nats"
            run.say(f"{shape.name(run.tokens)}, {states} hidden states, {entropy}")
            compare(run, head, shape, states)
            if states == "random":
                active_share(run, head, shape)
            del head
            if run.device == "cuda":
                torch.cuda.empty_cache()
    if run.out_of_time():
        run.note("benchmark: out of time, missing shapes and peers were not measured")


def compare(run: Run, head: Head, shape: Shape, states: str) -> None:
    title = f"{shape.name(run.tokens)}, {states} hidden states"
    flops = 2.0 * run.tokens * shape.hidden_size * shape.vocabulary
    everyone = peers(run.device, shape.softcap)
    if run.rehearse:  # in the interpreter
        everyone = [peer for peer in everyone if peer.name != "triton"] + [TRITON]
    ours_first = sorted(everyone, key=lambda peer: peer.name not in ("triton", "streaming"))
    for peer in ours_first:
        for what in WHATS:
            if run.out_of_time():
                return
            tables = [f"{x}: {title}" for x in ("Time / matmul", "ms", "Share of the matmul's rate", "Peak MiB")]
            if peer.run is None:
                run.report.add(tables[0], peer.name, what, peer.reason)
                continue
            step, leaves = head.step(peer.run, what, shape.softcap)
            try:
                times = measure.medians({"matmul": head.matmul, peer.name: step}, run.device, ROUNDS)
            except Exception as error:  # a peer that fails must not end the run
                run.report.add(tables[0], peer.name, what, f"{type(error).__name__}: {error}".splitlines()[0][:120])
                continue
            # The unavoidable products are 1, 2 and 3. (Ours takes 4 for a trainable head, as it computes logits twice.)
            matmuls = WHATS.index(what) + 1
            run.report.add(tables[0], peer.name, what, times[peer.name] / times["matmul"])
            run.report.add(tables[1], peer.name, what, times[peer.name] * 1e3)
            run.report.add(tables[1], f"(matmul timed with {peer.name})", what, times["matmul"] * 1e3)
            run.report.add(tables[2], peer.name, what, matmuls * times["matmul"] / times[peer.name])
            try:
                peak: float | str = measure.peak_bytes(step, leaves, run.device) / MIB
            except Exception as error:  # the times are valid without it
                peak = type(error).__name__
            run.report.add(tables[3], peer.name, what, peak)
            run.say(
                f"{peer.name}, {what}: {times[peer.name] / times['matmul']:.2f} × matmul, {times[peer.name] * 1e3:.2f} ms, "
                f"matmul {flops / times['matmul'] / 1e12:.0f} TFLOP/s, peak MiB {peak}"
            )
            run.report.write()


def active_share(run: Run, head: Head, shape: Shape) -> None:
    """Time against the share of tokens that have a target."""
    for share in (1.0, 0.5, 0.1, 0.0):
        targets = head.targets.where(torch.rand(run.tokens, device=run.device) < share, -100)
        step, _ = head._replace(targets=targets).step(TRITON.run, TRAINABLE, shape.softcap)
        times = measure.medians({"matmul": head.matmul, "triton": step}, run.device, ROUNDS)
        title = f"Time of triton / matmul of all tokens, by share of active tokens: {TRAINABLE}"
        run.report.add(title, shape.name(run.tokens), f"{share:.0%}".rjust(6), times["triton"] / times["matmul"])
    run.report.write()


def tune(run: Run) -> None:
    """Part 3, on random hidden states of the first shape; the literal is printed and becomes the last note."""
    from tuning import tune as fastest

    from fused_energy.triton import configs

    shape = run.shapes[0]
    head = random_head(run.tokens, shape.hidden_size, shape.vocabulary, run.dtype, run.device)
    table = {"TINY": configs.TINY} if run.rehearse else configs.HALF_PRECISION
    key = "TINY" if run.rehearse else configs.kind(head.hidden.device)
    found = fastest(head, table, key, run.until, run.rehearse, run.say)
    run.note(f'tuned at {shape.name(run.tokens)}: "{key}": {found!r}')


PARTS = {"correctness": check, "benchmark": benchmark, "tuning": tune}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run, in this order")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # tiny, in the interpreter, to find bugs
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("No GPU was found, but this script needs one: on a CPU, run pytest benches --benchmark-only.")
        return 2
    run = Run(arguments.rehearse, "python benches/gpu.py " + " ".join(sys.argv[1:]))
    try:
        measure.check(run.device)
    except Exception as error:
        run.note(f"Figures of peak memory are unreliable: {error}")
    for name in arguments.only:
        run.until = time.monotonic() + BUDGETS[name]
        run.say(f"--- {name}, {BUDGETS[name]:.0f} s")
        try:
            PARTS[name](run)
        except Exception as error:  # the other parts are still useful
            run.note(f"{name} ended with {type(error).__name__}: {error}")
        run.report.write()
    print(f"\n{run.report}\n\nWritten to {run.report.path}.")
    return 1 if any(note.startswith("WRONG") or " ended with " in note for note in run.report.notes) else 0


if __name__ == "__main__":
    raise SystemExit(main())

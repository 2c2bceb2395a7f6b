"""Collects medians, prints them as ratios to the bare matmul, and writes them to ``benches/results/``."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


class Ratios:
    def __init__(self) -> None:
        self.medians: dict[str, dict[str, dict[str, float]]] = {}

    def add(self, dtype: str, what: str, peer: str, seconds: float) -> None:
        self.medians.setdefault(dtype, {}).setdefault(what, {})[peer] = seconds

    def to_matmul(self) -> dict[str, dict[str, dict[str, float]]]:
        table: dict[str, dict[str, dict[str, float]]] = {}
        for dtype, whats in self.medians.items():
            base = whats.get("forward", {}).get("matmul")
            if base is not None:
                table[dtype] = {what: {peer: round(t / base, 3) for peer, t in peers.items()} for what, peers in whats.items()}
        return table


@pytest.fixture(scope="session")
def ratios(request: pytest.FixtureRequest) -> Iterator[Ratios]:
    collected = Ratios()
    yield collected
    table = collected.to_matmul()
    if not table:
        return
    lines = [
        f"{dtype:10} {what:34} {peer:26} {x:7.2f}"
        for dtype, w in table.items()
        for what, p in w.items()
        for peer, x in p.items()
    ]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nTime as a multiple of the bare matmul h @ Wᵀ (median of 5):\n" + "\n".join(lines))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": "pytest benches --benchmark-only",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
        "times_of_matmul": table,
    }
    (RESULTS / "energy-cpu.json").write_text(json.dumps(content, indent=2) + "\n")

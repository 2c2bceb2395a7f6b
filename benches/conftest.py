"""Fixtures for the reports that benchmarks fill; a report is written and printed after the last benchmark that fills it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import measure
import pytest
import torch
from report import Report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if DEVICE == "cuda" else ""
    yield from filled(request, f"energy-{gpu}-pytest" if gpu else "energy-cpu", "pytest benches --benchmark-only")


def filled(request: pytest.FixtureRequest, name: str, command: str) -> Iterator[Report]:
    """Yield a report for a fixture; write and print it after all benchmarks that fill it."""
    measure.check(DEVICE)
    report = Report(name, command, DEVICE)
    yield report
    report.write()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{report}\n\nWritten to {report.path}.")

"""Tests that starting is cheap: nothing heavy is imported before it is used, and nothing looks like a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft")


def run(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "code", ["import eua", "import eua; dir(eua); eua.__version__", "from eua.cli.main import main; main(['--help'])"]
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    assert run(f"{code}; import sys; print([name for name in {HEAVY} if name in sys.modules])").stdout.endswith("[]\n")
    if sys.platform == "linux":
        most = run(f"{code}; print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])").stdout.split()[-1]
        assert int(most) < 40 * 1024  # KiB of resident memory


def test_the_energy_op_costs_little_beyond_torch():
    code = "import sys, torch; before = set(sys.modules); import fused_energy; print(*set(sys.modules) - before)"
    added = run(code).stdout.split()
    assert not [name for name in added if name.split(".")[0] not in ("fused_energy", "einops")]


def test_every_name_of_the_package_is_there():
    code = (
        "import eua; "
        "print([name for name in eua.__all__ if getattr(eua, name) is None]); "
        "print(set(eua.__all__) <= set(dir(eua))); "
        "from eua import *; print(EUATrainer.__name__, EnergyGuard.__name__, d2_loss.__name__)"
    )
    done = run(code)
    assert done.stdout.splitlines() == ["[]", "True", "EUATrainer EnergyGuard d2_loss"]
    assert done.stderr == ""  # no library reports that something optional is missing


def test_an_unknown_name_raises_attribute_error():
    assert "has no attribute 'EUATrain'" in run("import eua\ntry: eua.EUATrain\nexcept AttributeError as e: print(e)").stdout

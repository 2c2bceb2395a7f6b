"""The house rules: who imports whom, and that nothing needs triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTSIDE_EVERYWHERE = set(sys.stdlib_module_names)
# Module (or package, with its modules) → what it may import besides the standard library.
ALLOWED = {
    "fused_energy": {"fused_energy.api", "fused_energy.module"},
    "fused_energy.module": {"torch", "fused_energy.api", "fused_energy.dispatch"},
    "fused_energy.api": {
        "torch",
        "fused_energy.autograd",
        "fused_energy.dispatch",
        "fused_energy.parallel",
        "fused_energy.reference",
        "fused_energy.common",
        "fused_energy.streaming",
        "fused_energy.validation",
    },
    "fused_energy.dispatch": {"torch", "fused_energy.common", "fused_energy.streaming", "fused_energy.triton"},
    "fused_energy.autograd": {"torch", "fused_energy.dispatch", "fused_energy.parallel", "fused_energy.common"},
    "fused_energy.validation": {"torch", "fused_energy.common"},
    "fused_energy.common": {"torch"},
    "fused_energy.reference": {"torch", "fused_energy.common"},
    "fused_energy.streaming": {"torch", "fused_energy.common"},
    "fused_energy.parallel": {"torch", "fused_energy.common"},
}


def is_ours(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            is_module = [is_ours(name) for name in modules]
            found |= modules if all(is_module) else {node.module}
    ours = ("eua", "fused_energy")
    return {name if name.split(".")[0] in ours else name.split(".")[0] for name in found} - OUTSIDE_EVERYWHERE


def modules() -> dict[str, Path]:
    paths = sorted(ROOT.glob("fused_energy/**/*.py")) + sorted(ROOT.glob("eua/**/*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_modules_import_only_what_they_may(name):
    assert imports_of(modules()[name]) <= ALLOWED[name]


def test_fused_energy_knows_nothing_of_language_models():
    for name, path in modules().items():
        if name.startswith("fused_energy"):
            assert not {module for module in imports_of(path) if module.startswith(("eua", "transformers", "peft"))}


def test_only_one_package_imports_triton():
    for name, path in modules().items():
        if name.split(".")[:2] != ["fused_energy", "triton"]:
            assert "triton" not in imports_of(path), name


def test_packages_never_use_asserts_or_pickles_for_users():
    for path in modules().values():
        tree = ast.parse(path.read_text())
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        assert "pickle.load" not in path.read_text()
        assert "trust_remote_code=True" not in path.read_text()


def test_everything_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, eua, eua.cli, eua.demo.run, eua.evaluation\n"
        "from fused_energy import linear_energy\n"
        "print(linear_energy(torch.ones(2, 3), torch.ones(4, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "torch.Size([2])", done.stderr

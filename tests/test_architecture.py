"""Tests of the house rules: which package may import which, and that everything works without triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# Layers of packages, from the command line down to the one that imports none of the others: package → libraries it may import.
# A package imports only its own files and packages of lower layers; packages of the same layer do not import each other.
LAYERS: list[dict[str, set[str]]] = [
    {"eua.__main__": set()},
    {"eua.cli": {"accelerate", "peft"}},
    {"eua.bench": {"huggingface_hub", "optuna", "scipy", "sqlalchemy", "torch", "transformers"}},
    {"eua.demo": {"tokenizers", "torch", "transformers"}},
    {
        "eua.evaluation": {"bitsandbytes", "matplotlib", "pyarrow", "rouge_score", "scipy", "torch", "tqdm", "transformers"},
        "eua.serving": {"prometheus_client", "starlette", "torch", "transformers", "uvicorn"},
        "eua.vllm": {"torch", "vllm"},
    },
    {
        "eua.training": {"accelerate", "huggingface_hub", "peft", "safetensors", "torch", "tqdm", "transformers", "yaml"},
        "eua.guard": {"einops", "huggingface_hub", "jinja2", "peft", "torch", "tqdm", "transformers"},
    },
    {"eua.methods": {"torch"}},
    {"eua.model": {"peft", "torch", "tqdm", "transformers"}},
    {"eua.data": {"datasets", "pyarrow", "torch", "transformers"}},
    {"eua.statistics": {"torch"}, "eua.files": set(), "eua.distributed": {"accelerate", "deepspeed", "torch"}},
    {"eua.errors": set()},
    {"fused_energy.module": {"torch"}},
    {"fused_energy.api": {"einops", "torch"}},
    {"fused_energy.autograd": {"torch"}, "fused_energy.validation": {"torch"}},
    {"fused_energy.dispatch": {"torch"}, "fused_energy.parallel": {"einops", "torch"}},
    {"fused_energy.triton": {"torch", "triton"}},
    {"fused_energy.reference": {"einops", "torch"}, "fused_energy.streaming": {"torch"}},
    {"fused_energy.common": {"torch"}},
]
LAZY = {"eua", "fused_energy"}  # names that the top-level packages offer may be imported from anywhere in eua


def package_of(module: str) -> str | None:
    """The entry of the table that one of our modules belongs to."""
    return next((name for layer in LAYERS for name in layer if module == name or module.startswith(f"{name}.")), None)


def is_ours(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path, *, annotations: bool = True) -> set[str]:
    """All imports of a file; without ``annotations``, except those that are only for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if not annotations:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            is_module = [is_ours(name) for name in modules]
            found |= modules if all(is_module) else {node.module}
    ours = ("eua", "fused_energy")
    return {name if name.split(".")[0] in ours else name.split(".")[0] for name in found} - STANDARD_LIBRARY


def modules() -> dict[str, Path]:
    paths = sorted(ROOT.glob("fused_energy/**/*.py")) + sorted(ROOT.glob("eua/**/*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@pytest.mark.parametrize("name", [name for name in modules() if name not in LAZY])
def test_packages_import_only_downwards(name):
    layers = {package: place for place, layer in enumerate(LAYERS) for package in layer}
    package = package_of(name)
    assert package is not None, f"{name} belongs to no package of the table: add it"
    ours = {module for module in imports_of(modules()[name]) if module.split(".")[0] in LAZY}
    libraries = imports_of(modules()[name]) - ours
    assert libraries <= LAYERS[layers[package]][package]
    if name.startswith("eua"):
        ours -= LAZY
    upwards = {module for module in ours if package_of(module) != package and layers[package_of(module)] <= layers[package]}
    assert not upwards


def test_the_table_has_no_unused_entries():
    for layer in LAYERS:
        for package, libraries in layer.items():
            inside = [path for name, path in modules().items() if package_of(name) == package]
            used = {module for path in inside for module in imports_of(path) if module.split(".")[0] not in LAZY}
            assert inside, package
            assert libraries <= used, package


def test_no_import_cycles():
    graph = {name: imports_of(path, annotations=False) & modules().keys() for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


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
        "import torch, eua.cli.unlearn, eua.demo.run, eua.evaluation\n"
        "from fused_energy import linear_energy\n"
        "print(linear_energy(torch.ones(2, 3), torch.ones(4, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "torch.Size([2])", done.stderr

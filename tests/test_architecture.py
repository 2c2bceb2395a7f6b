"""The house rules: who imports whom, and that nothing needs triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# Room by room, from what people call down to what knows nothing of the rest: (what it holds, libraries it may import). A room
# imports only from its own files and from rooms further down; rooms of one line do not import each other.
ROOMS: list[dict[str, set[str]]] = [
    {"eua.__main__": set()},
    {"eua.cli": {"accelerate", "peft"}},
    {"eua.demo": {"tokenizers", "torch", "transformers"}},
    {
        "eua.evaluation": {"matplotlib", "torch", "transformers"},
        "eua.serving": {"prometheus_client", "starlette", "torch", "transformers", "uvicorn"},
        "eua.vllm": {"huggingface_hub", "torch", "vllm"},
    },
    {
        "eua.training": {"accelerate", "huggingface_hub", "peft", "safetensors", "torch", "tqdm", "transformers", "yaml"},
        "eua.guard": {"einops", "jinja2", "peft", "torch", "tqdm", "transformers"},
    },
    {"eua.methods": {"torch"}},
    {"eua.model": {"peft", "torch", "tqdm", "transformers"}},
    {"eua.data": {"torch", "transformers"}},
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
LAZY = {"eua", "fused_energy"}  # what a package's own __init__ offers, from anywhere in it


def room_of(module: str) -> str | None:
    """The room that a module of ours stands in."""
    return next((room for floor in ROOMS for room in floor if module == room or module.startswith(f"{room}.")), None)


def is_ours(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path, *, annotations: bool = True) -> set[str]:
    """What a file imports, anywhere in it; without ``annotations``, not what it imports for type checkers alone."""
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
def test_rooms_import_only_downwards(name):
    floors = {room: place for place, floor in enumerate(ROOMS) for room in floor}
    room = room_of(name)
    assert room is not None, f"{name} stands in no room: put it into the table"
    ours = {module for module in imports_of(modules()[name]) if module.split(".")[0] in LAZY}
    libraries = imports_of(modules()[name]) - ours
    assert libraries <= ROOMS[floors[room]][room]
    if name.startswith("eua"):
        ours -= LAZY
    upwards = {module for module in ours if room_of(module) != room and floors[room_of(module)] <= floors[room]}
    assert not upwards


def test_the_table_names_nothing_that_is_not_there():
    for floor in ROOMS:
        for room, libraries in floor.items():
            inside = [path for name, path in modules().items() if room_of(name) == room]
            used = {module for path in inside for module in imports_of(path) if module.split(".")[0] not in LAZY}
            assert inside, room
            assert libraries <= used, room


def test_no_circle_of_modules():
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

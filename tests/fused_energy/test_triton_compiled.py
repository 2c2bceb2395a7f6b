"""Tests that compile the Triton kernels for GPUs that are not present: every launch, with every setting of the table.

The tests compile what the launchers really pass: they record the launches of forward and backward passes instead of running
them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fused_energy import dispatch

if not dispatch.HAS_TRITON or dispatch.TRITON_IS_INTERPRETED:
    pytest.skip("needs triton, and kernels that are not interpreted", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fused_energy import triton as kernels
from fused_energy.common import HeadOptions
from fused_energy.triton import configs
from fused_energy.triton.launch import Problem

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "hip": 64 * 1024}  # bytes; sm80 also serves 8.6
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def source(self) -> ASTSource:
        """The source as Triton specializes it for a launch: a 1 is a constant, and multiples of 16 are marked as such."""
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, self.arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        for name in self.kernel.arg_names[len(self.arguments) :]:
            signature[name], constants[name] = "constexpr", self.constants[name]
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: GPUTarget) -> Any:
        options = {name: self.constants[name] for name in ("num_warps", "num_stages") if name in self.constants}
        return triton.compile(self.source(), target=target, options=options)


@pytest.fixture
def launches_of(monkeypatch) -> Callable[..., dict[str, Launch]]:
    """Every distinct launch of forward and backward passes with these settings and sizes, keyed by its specialization."""

    def collect(settings: configs.Configs, dtype: torch.dtype, n: int, h: int, v: int) -> dict[str, Launch]:
        found: dict[str, Launch] = {}

        def catch(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **constants: Any) -> None:
            launch = Launch(kernel, arguments, constants | {"UPCAST": False})
            source = launch.source()
            key = f"{kernel.__name__} {source.signature} {source.constants} {source.attrs}"
            found[key] = launch

        monkeypatch.setattr(JITFunction, "run", catch)
        monkeypatch.setattr(configs, "choose", lambda *_: settings)
        tile_constants = Problem.tile_constants
        monkeypatch.setattr(Problem, "tile_constants", lambda self, config: tile_constants(self, config) | {"UPCAST": False})
        hidden, weight = torch.ones(n, h, dtype=dtype), torch.ones(v, h, dtype=dtype)
        bias, targets = torch.ones(v, dtype=dtype), torch.zeros(n, dtype=torch.int64)
        for options, b, y in (
            (HeadOptions(1.0, 1.0, None), None, targets),
            (HeadOptions(0.7, 0.5, 30.0), bias, targets),
            (HeadOptions(1.0, 1.0, None), None, None),
        ):
            kernels.forward(hidden, weight, b, y, options, False)
            done = kernels.forward(hidden, weight, b, y, options, True)
            upstream = torch.ones(n)
            kernels.head_gradient(
                hidden, weight, b, y, options, done.energy, torch.ones_like(done.energy), upstream, (True, b is not None)
            )
        return found

    return collect


def spilled_bytes(compiled: Any, target: GPUTarget, folder: Path) -> int:
    if target.backend == "hip":
        # Scalar registers spill into lanes of vector registers, not into memory.
        return sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    architecture = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert architecture
    assembler = get_ptxas(target.arch).path
    command = [assembler, "-v", f"--gpu-name={architecture[1]}", source, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    assert len(spills) == 2, report
    return sum(map(int, spills))


SIZES = {"aligned": (256, 512, 1024), "ragged": (100, 100, 1001)}
CASES = [
    *((kind, "half precision", torch.bfloat16, "aligned") for kind in TARGETS),
    *((kind, "general", torch.float32, "aligned") for kind in TARGETS),
    ("sm90", "half precision", torch.float16, "aligned"),
    ("sm90", "general", torch.bfloat16, "ragged"),
    ("sm80", "general", torch.float16, "ragged"),
    ("hip", "general", torch.bfloat16, "ragged"),
]


@pytest.mark.parametrize(("kind", "table", "dtype", "sizes"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_kernels_fit_their_gpu(kind, table, dtype, sizes, launches_of, tmp_path):
    target = TARGETS[kind]
    settings = configs.HALF_PRECISION[kind] if table == "half precision" else configs.GENERAL
    launches = launches_of(settings, dtype, *SIZES[sizes])
    names = {launch.kernel.__name__ for launch in launches.values()}
    assert len(names) == 6, names
    for launch in launches.values():
        compiled, name = launch.compile(target), launch.kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY[kind], name
        assert spilled_bytes(compiled, target, tmp_path) == 0, f"{name} {launch.constants}"
        multiplies = name != "_fold_kernel" and table == "half precision"
        if multiplies and kind == "sm90":
            assert "wgmma.mma_async" in compiled.asm["ptx"], name
        if multiplies and kind == "sm100":
            assert "tcgen05.mma" in compiled.asm["ptx"], name
        if multiplies and kind == "hip":
            assert "mfma" in compiled.asm["amdgcn"], name
        if multiplies and target.backend == "cuda":  # both operands are prefetched, 16 bytes at a time
            assert compiled.asm["ptx"].count("cp.async.cg") >= 8, name


@pytest.mark.parametrize("settings", [*configs.HALF_PRECISION.values(), configs.GENERAL, configs.TINY])
def test_products_read_whole_tiles(settings):
    """Scratch is padded to tiles of logits, and the products must not read beyond it: see product.py."""
    for logits in (settings.logits, settings.logits_with_softcap):
        assert logits.columns % settings.by_tokens.rows == 0
        assert logits.columns % settings.by_head.depth == 0

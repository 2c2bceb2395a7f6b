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
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_energy import triton as kernels
from fused_energy.common import HeadOptions
from fused_energy.triton import configs

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "hip": 64 * 1024}  # bytes; sm80 also serves 8.6
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def source(self) -> ASTSource:
        """The source as Triton specializes it for a launch: a 1 is a constant, and multiples of 16 are marked as such."""
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, self.arguments, strict=False)):
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
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
    """Every distinct launch of forward and backward passes on this kind of GPU and these sizes, keyed by its specialization."""

    def collect(kind: str, dtype: torch.dtype, n: int, h: int, v: int) -> dict[str, Launch]:
        found: dict[str, Launch] = {}

        def catch(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **constants: Any) -> None:
            launch = Launch(kernel, arguments, constants)
            source = launch.source()
            key = f"{kernel.__name__} {source.signature} {source.constants} {source.attrs}"
            found[key] = launch

        monkeypatch.setattr(JITFunction, "run", catch)
        monkeypatch.setattr(configs, "kind", lambda _: kind)
        monkeypatch.setattr(configs, "interpreted", lambda _: False)
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
            kernels.hidden_gradient(hidden, weight, y, options, done, torch.ones_like(done.energy), upstream)
            kernels.head_gradient(
                hidden, weight, b, y, options, done.energy, torch.ones_like(done.energy), upstream, (True, b is not None)
            )
        return found

    return collect


SERIALIZED = "C7515"  # the assembler's warning that products wait for each other


def spilled_bytes(compiled: Any, target: GPUTarget, folder: Path) -> int:
    """What spilled from registers. The assembler must not have warned that products of the tensor cores are serialized."""
    if target.backend == "hip":
        # Scalar registers spill into lanes of vector registers, not into memory.
        return sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    architecture = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert architecture
    assembler = get_ptxas(target.arch).path
    command = [assembler, "-v", f"--gpu-name={architecture[1]}", source, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    report = report.stdout + report.stderr
    assert SERIALIZED not in report, report
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
    launches = launches_of(kind, dtype, *SIZES[sizes])
    names = {launch.kernel.__name__ for launch in launches.values()}
    assert names == {
        "_logsumexp_kernel",
        "_target_logit_kernel",
        "probabilities_kernel",
        "gradients_kernel",
        "_hidden_gradient_kernel",
    }
    for launch in launches.values():
        compiled, name = launch.compile(target), launch.kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY[kind], name
        assert spilled_bytes(compiled, target, tmp_path) == 0, f"{name} {launch.constants}"
        if name != "_logsumexp_kernel" or table != "half precision":
            continue
        if kind == "sm90":
            assert "wgmma.mma_async" in compiled.asm["ptx"]
            assert "cp.async.bulk.tensor" in compiled.asm["ptx"]  # the tensor memory accelerator loads both operands
        if kind == "sm100":
            assert "tcgen05.mma" in compiled.asm["ptx"]
        if kind == "hip":
            assert "mfma" in compiled.asm["amdgcn"]
        if kind in ("sm80", "sm100"):  # both operands are prefetched, 16 bytes at a time
            assert compiled.asm["ptx"].count("cp.async.cg") >= 8

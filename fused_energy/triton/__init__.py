"""The energy op as Triton kernels, for GPUs. Only this package imports triton; it is loaded when it is chosen."""

import triton

from fused_energy.shared import hidden_gradient
from fused_energy.triton.backward import head_gradient
from fused_energy.triton.forward import forward

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, step by step

__all__ = ["INTERPRETED", "forward", "head_gradient", "hidden_gradient"]

"""The energy op as Triton kernels, for GPUs. Only this package imports triton; it is imported only if it is chosen."""

from fused_energy.triton.backward import head_gradient, hidden_gradient
from fused_energy.triton.forward import forward

__all__ = ["forward", "head_gradient", "hidden_gradient"]  # the interface of an implementation

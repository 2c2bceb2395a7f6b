"""Make a language model forget what it must not know, and refuse coherently when asked for it.

Names are imported on first use: ``import eua`` loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eua.errors import EUAError
    from eua.guard.guard import EnergyGuard
    from eua.methods.d2 import d2_loss
    from eua.training.config import EUAConfig
    from eua.training.trainer import EUATrainer

    __version__: str

# At import it logs an error about a missing optional kernel, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULES = {
    "EUAConfig": "eua.training.config",
    "EUAError": "eua.errors",
    "EUATrainer": "eua.training.trainer",
    "EnergyGuard": "eua.guard.guard",
    "d2_loss": "eua.methods.d2",
}
__all__ = ["EUAConfig", "EUAError", "EUATrainer", "EnergyGuard", "__version__", "d2_loss"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("eua")
    if name not in _MODULES:
        raise AttributeError(f"module 'eua' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

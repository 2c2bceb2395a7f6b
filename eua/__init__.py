"""Make a language model forget what it must not know, and refuse, coherently, when asked for it."""

from eua.errors import EUAError
from eua.guard.guard import EnergyGuard
from eua.methods.d2 import d2_loss
from eua.training.config import EUAConfig
from eua.training.trainer import EUATrainer

__all__ = ["EUAConfig", "EUAError", "EUATrainer", "EnergyGuard", "d2_loss"]

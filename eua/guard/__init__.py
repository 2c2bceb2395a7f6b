"""EnergyGuard: which prompts are refused, and the refusal inside ``generate``."""

"""EnergyGuard: decides which prompts to refuse, and refuses them inside ``generate``."""

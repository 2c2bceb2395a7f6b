"""Energy of tokens straight from hidden states, without keeping the logits.

``linear_energy`` fuses the language-model head with a logsumexp; ``tail_energy`` gives the boundary energies of
Distinguishable Deletion. Nothing here knows of language models: hidden states and a weight matrix go in, one number
per token comes out.
"""

from fused_energy.api import EnergyNLL, linear_energy, tail_energy

__all__ = ["EnergyNLL", "linear_energy", "tail_energy"]

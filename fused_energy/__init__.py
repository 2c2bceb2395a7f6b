"""Energy of tokens, computed directly from hidden states without storing the logits.

``linear_energy`` fuses the language-model head with a logsumexp; ``tail_energy`` gives the boundary energies of
Distinguishable Deletion; ``LinearEnergy`` is the module form. The package knows nothing of language models: hidden states and a
weight matrix go in, one number per token comes out.
"""

from fused_energy.api import EnergyNLL, linear_energy, tail_energy
from fused_energy.module import LinearEnergy

__all__ = ["EnergyNLL", "LinearEnergy", "linear_energy", "tail_energy"]

"""A language model's output head, hidden states and energies; loading, recognising and asking a model."""

"""EUATrainer: its settings, boundaries, checkpoints, evaluation and model card."""

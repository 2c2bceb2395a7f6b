"""Losses of unlearning methods: tensors in, tensors out."""

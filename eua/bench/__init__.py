"""Compares unlearning methods on one footing: the same task, the same number of trials, one measurement."""

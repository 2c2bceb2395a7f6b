"""Benchmarks of unlearning methods: tasks, trials, tables."""

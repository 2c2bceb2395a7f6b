"""Measures what a model still knows, what it refuses, and how well energies separate the two (method.md §6)."""

from eua.evaluation.metrics import AnswerMeasures, measure_answers, truth_ratios
from eua.evaluation.report import evaluate, render_tables

__all__ = ["AnswerMeasures", "evaluate", "measure_answers", "render_tables", "truth_ratios"]

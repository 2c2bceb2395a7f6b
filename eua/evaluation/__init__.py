"""Measures what a model still knows, what it refuses, and how well energies separate the two (method.md §6)."""

from eua.evaluation.full_report import measure_all
from eua.evaluation.metrics import AnswerMeasures, measure_answers, truth_ratios
from eua.evaluation.report import evaluate, render_tables
from eua.evaluation.results import read_results, write_results
from eua.evaluation.retain_model import RetainFigures, measure_retain_model

__all__ = [
    "AnswerMeasures",
    "RetainFigures",
    "evaluate",
    "measure_all",
    "measure_answers",
    "measure_retain_model",
    "read_results",
    "render_tables",
    "truth_ratios",
    "write_results",
]

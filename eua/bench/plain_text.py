"""Texts that have nothing to do with what is forgotten: to measure a model's perplexity on, and to relearn on."""

from __future__ import annotations

from pathlib import Path

_FILE = Path(__file__).with_name("plain_text.txt")


def plain_text() -> list[str]:
    """Thirty short paragraphs on nothing in particular, written for this package, to measure a model's perplexity on."""
    return _FILE.read_text(encoding="utf-8").strip().split("\n\n")

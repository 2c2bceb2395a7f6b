"""A type error that mypy can report only if it sees the package's types. ``tests/package/check`` expects the report."""

from eua import EnergyGuard

threshold: str = EnergyGuard.from_pretrained("unlearned").threshold

"""A mistake that only someone who sees the types of the package can report: ``tests/package/check`` wants it reported."""

from eua import EnergyGuard

threshold: str = EnergyGuard.from_pretrained("unlearned").threshold

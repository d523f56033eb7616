"""Faults to plant in an artifact while it is built; `planted.py` plants them."""

from planting import described, edited, lowered, stored, understood, written  # noqa: F401  (each registers its faults)
from planting.table import AT, FAULTS, Fault, Site

__all__ = ["AT", "FAULTS", "Fault", "Site"]

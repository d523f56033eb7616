"""Faults to plant in an artifact while it is built; `planted.py` plants them."""

from planting import (  # noqa: F401  (each registers its faults)
    described,
    edited,
    lowered,
    ragged,
    routed,
    stored,
    understood,
    written,
)
from planting.table import AT, FAULTS, Fault, Site

__all__ = ["AT", "FAULTS", "Fault", "Site"]

"""What each ATen operation is in ggml: one table, ``RULES``, filled by a module for each topic."""

from __future__ import annotations

from . import (  # noqa: F401  each module enters its rules in the table
    attention,
    complex_numbers,
    convolutions,
    elementwise,
    fourier,
    images,
    indexing,
    joins,
    norms,
    padding,
    products,
    reductions,
    shapes,
    truth,
)
from .base import RULES, Out

__all__ = ["RULES", "Out"]

"""Integrals beside y: `solve(..., integral=)` and regularized fields."""

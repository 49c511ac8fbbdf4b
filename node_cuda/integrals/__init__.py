"""Integrals along the solution: `solve(..., integral=)` and regularized fields."""

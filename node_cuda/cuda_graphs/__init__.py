"""Solves captured as CUDA graphs. Outside of this folder, only `try_captured` and `Stats.why` know of them."""

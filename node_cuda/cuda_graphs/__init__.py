"""Solves captured as CUDA graphs: what is captured, when it serves again, and why the host takes the steps instead."""

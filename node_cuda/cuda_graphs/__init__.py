"""Solves captured as CUDA graphs: the capture, the cache, and the reason if the host loop solves instead."""

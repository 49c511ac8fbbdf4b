"""The primitives of a step, one contract: `reference` is plain PyTorch, the CPU path and the truth in tests."""

"""The primitives of a step. `reference`, in plain PyTorch, is the CPU path, and the tests compare all others with
it."""

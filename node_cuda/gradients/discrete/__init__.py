"""The discrete adjoint: the backward pass recomputes every accepted step, and differentiates it."""

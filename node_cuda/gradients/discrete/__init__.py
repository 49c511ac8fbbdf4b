"""The discrete adjoint: every accepted step is taken again, and differentiated."""

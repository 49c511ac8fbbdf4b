"""Implicit methods, for stiff fields: their tableaus, the Jacobian, and how a step is taken."""

"""The continuous adjoint method: a second ODE is solved backwards."""

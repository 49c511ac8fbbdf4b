"""Layers: a neural ODE, a residual block with a continuous depth, and a continuous normalizing flow."""

from node_cuda.nn.flow import ContinuousFlow
from node_cuda.nn.neural_ode import NeuralODE
from node_cuda.nn.residual import ODEBlock

__all__ = ["ContinuousFlow", "NeuralODE", "ODEBlock"]

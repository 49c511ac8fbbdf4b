"""Neural ODEs for PyTorch: torchdiffeq's interface, with fewer operations a step and gradients to rely on.

from node_cuda import odeint_adjoint as odeint
"""

# `compile` is not in __all__: `from node_cuda import *` is not to replace Python's own.
from node_cuda._version import __version__
from node_cuda.compiled import compile as compile
from node_cuda.diagnosis import Diagnosis, diagnose
from node_cuda.event import odeint_event
from node_cuda.integrals.regularized import regularized
from node_cuda.kernels.backend import backend
from node_cuda.methods.register import register_method
from node_cuda.methods.registry import METHODS
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.nn import ContinuousFlow, NeuralODE, ODEBlock
from node_cuda.odeint import odeint, odeint_adjoint, odeint_dense, solve
from node_cuda.solution import Solution, Stats
from node_cuda.status import (
    InvalidField,
    InvalidInput,
    InvalidState,
    InvalidType,
    MissingGradientWarning,
    PerformanceWarning,
    ReconstructionWarning,
    SolveError,
    Status,
    StiffnessWarning,
    Unsupported,
)

__all__ = [
    "METHODS",
    "TABLEAUS",
    "ContinuousFlow",
    "Diagnosis",
    "InvalidField",
    "InvalidInput",
    "InvalidState",
    "InvalidType",
    "MissingGradientWarning",
    "NeuralODE",
    "ODEBlock",
    "PerformanceWarning",
    "ReconstructionWarning",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "StiffnessWarning",
    "Unsupported",
    "__version__",
    "backend",
    "diagnose",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "register_method",
    "regularized",
    "solve",
]

"""One table of tolerances, each with its reason."""

from __future__ import annotations

import torch

# Drop-in tests: ten times the scatter of torchdiffeq itself if f changes by one ulp, but never below these floors. Both
# libraries round the same sums in another order, and a step time is a product of about a hundred rounded factors.
SCATTER_FACTOR = 10.0
TIME_FLOOR = 1e-10  # of the length of the interval
OUTPUT_FLOOR = 1e-9  # of the largest output

# A solve with tolerance rtol has a local error of rtol in each step; the global error is that times a growth factor.
GLOBAL_ERROR_OVER_RTOL = 100.0

# The second-order pairs need a hundred times more steps, so their tolerance is larger. The error estimate of fehlberg2
# is the difference of its last two weights, 1/512 h (k3 - k1). It is about a hundred times smaller than the error of a
# step.
ASKED_RTOL = {"adaptive_heun": 1e-3, "fehlberg2": 1e-6}
ESTIMATE_TOO_SMALL = {"fehlberg2": 100.0}

# A measured order may differ from the true one by the next term of its error series at these step sizes.
SLOPE = 0.25

# Two computations of the same number in one dtype: a hundred rounding errors.
ROUNDING = {
    torch.float16: 100 * 2**-11,
    torch.bfloat16: 100 * 2**-8,
    torch.float32: 100 * 2**-24,
    torch.float64: 100 * 2**-53,
    torch.complex64: 100 * 2**-24,
    torch.complex128: 100 * 2**-53,
}

# gradcheck: central differences with eps 1e-6 of a solve in float64 err by about eps^2 and 1e-16 / eps.
GRADCHECK = dict(eps=1e-6, atol=1e-6, rtol=1e-5)


def rtol_and_limit(method: str, rtol: float) -> tuple[float, float]:
    """Return the rtol for `method` in the place of `rtol`, and the allowed relative error at the end of a step."""
    rtol = max(rtol, ASKED_RTOL.get(method, 0.0))
    return rtol, GLOBAL_ERROR_OVER_RTOL * ESTIMATE_TOO_SMALL.get(method, 1.0) * rtol

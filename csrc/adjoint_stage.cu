// adjoint_stage: kappa_i = dt b_i lam + dt sum_j a_ji mu_j, the cotangent of stage i in the discrete adjoint.
// Reads lam and the mu_j with coefficients that are not zero, writes kappa: 2..5 reads and a write for dopri5.
// adjoint_finish: lam + sum_j mu_j. Both are rk_stage's kernel: one without a base, one with dt = 1.
#include "combine.h"

namespace node_cuda {

extern "C" int launch_adjoint_stage(int dtype, int64_t n, void* kappa, int count, const void* const* x, const double* a,
                                    const Where* where, On on) {
  return combine("adjoint_stage", dtype, n, kappa, nullptr, count, x, a, *where, Slot{}, on);
}

extern "C" int launch_adjoint_finish(int dtype, int64_t n, void* out, const void* lam, int count, const void* const* mu,
                                     On on) {
  const Where unit{nullptr, Interval{0.0, 1.0, 1.0, 1.0}, 1.0};
  return combine("adjoint_finish", dtype, n, out, lam, count, mu, nullptr, unit, Slot{}, on);
}

}  // namespace node_cuda

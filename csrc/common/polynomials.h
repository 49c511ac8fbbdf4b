// The polynomials of a dense output, passed to a kernel by value; shared by dense_eval and its transpose.
#pragma once
#include "common/combine.h"

namespace node_cuda {

constexpr int OUTPUTS_AT_ONCE = 64;  // their weights are in shared memory

// The interpolant: B_j(x) = sum_d weight[j][d] x^(d + 1), and P from `end` in the same way; P = 0 without it.
template <int S>
struct Polynomials {
  double weight[Terms<S>::CAPACITY][MAX_DEGREE] = {};
  double end[MAX_DEGREE] = {};
  int degree, has_end;

  Polynomials(int count, int degree, const double* weights, const double* end_weights)
      : degree(degree), has_end(end_weights != nullptr) {
    for (int d = 0; d < degree; ++d) {
      for (int j = 0; j < count; ++j) weight[j][d] = weights[j * degree + d];
      if (end_weights != nullptr) end[d] = end_weights[d];
    }
  }
};

__device__ inline double evaluate(const double* weight, int degree, double x) {
  double value = 0.0;
  for (int d = degree - 1; d >= 0; --d) value = mul(value + weight[d], x);
  return value;
}

// x in [0, 1] of a time in a step.
__device__ inline double position(const Interval& at, double time) {
  return py_min((time - at.t0) / (at.t1 - at.t0), 1.0);
}

}  // namespace node_cuda

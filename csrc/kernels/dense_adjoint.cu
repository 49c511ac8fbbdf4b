// dense_adjoint: the transpose of dense_eval. The gradients of the outputs in a step become cotangents of y1, y0 and
// the k_j. Each cotangent is a weighted sum over all the outputs, with one row of weights. Reads lam and the gradients
// (once for up to 9 rows and 64 outputs), writes every row: 1 + m reads for m outputs, and 2 + count writes.
#include "common/polynomials.h"

namespace node_cuda {

constexpr int ROWS_AT_ONCE = 9;  // rows that a thread sums at once: all those of bosh3, dopri5 and tsit5

// The memory for the sums: of lam, of start, and one for each polynomial.
struct Cotangents {
  void* out[MAX_TERMS + 2];
  int count;
};

// The weight of an output's gradient in a row. The output at the end of the step is y1 itself.
__device__ inline double coefficient(const Polynomials<0>& polynomials, int row, const Interval& at, double time) {
  if (time == at.t1) return row == 0 ? 1.0 : 0.0;
  const double x = position(at, time);
  if (row >= 2) return at.dt * evaluate(polynomials.weight[row - 2], polynomials.degree, x);
  const double of_end = polynomials.has_end ? evaluate(polynomials.end, polynomials.degree, x) : 0.0;
  return row == 0 ? of_end : 1.0 - of_end;
}

// The rows of gradients may have any alignment, independent of lam.
template <class T, int N>
__device__ inline void load_row(const T* p, Acc<T> (&x)[N]) {
  if constexpr (N > 1) {
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return load(p, x);
  }
#pragma unroll
  for (int l = 0; l < N; ++l) x[l] = to_acc(p[l]);
}

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    dense_adjoint_kernel(Split split, const __grid_constant__ Cotangents rows, const T* lam, const T* gradients,
                         const double* times, int64_t first, int64_t stop,
                         const __grid_constant__ Polynomials<0> polynomials, StepRef where) {
  [[maybe_unused]] __shared__ Acc<T> weight[OUTPUTS_AT_ONCE][ROWS_AT_ONCE];  // g++ does not count the use in the lambda
  Step step;
  if (!read_next(where, &step)) return;
  if (where.ctl != nullptr) {
    first = where.ctl->first_output;
    stop = where.ctl->next_output;
  }
  for (int group = 0; group < rows.count; group += ROWS_AT_ONCE) {
    const int count = rows.count - group < ROWS_AT_ONCE ? rows.count - group : ROWS_AT_ONCE;
    int64_t begin = first;
    do {  // at least once, also without outputs
      const int64_t left = stop - begin;
      const int outputs = static_cast<int>(left < 0 ? 0 : left < OUTPUTS_AT_ONCE ? left : OUTPUTS_AT_ONCE);
      __syncthreads();  // wait until the last use of the weights is over
      for (int q = threadIdx.x; q < outputs * ROWS_AT_ONCE; q += blockDim.x) {
        const int o = q / ROWS_AT_ONCE, r = q % ROWS_AT_ONCE;
        weight[o][r] = r < count ? static_cast<Acc<T>>(coefficient(polynomials, group + r, step.at, times[begin + o]))
                                 : Acc<T>(0);
      }
      __syncthreads();
      for_each<T>(split, [&](auto width, int64_t i) {
        constexpr int N = decltype(width)::value;
        Acc<T> acc[ROWS_AT_ONCE][N] = {};
        if (begin > first) {  // the sums over the outputs so far
#pragma unroll
          for (int r = 0; r < ROWS_AT_ONCE; ++r)
            if (r < count) load(static_cast<const T*>(rows.out[group + r]) + i, acc[r]);
        } else if (group == 0) {
          load(lam + i, acc[0]);
        }
#pragma unroll 1  // several outputs at once would need too many registers
        for (int o = 0; o < outputs; ++o) {
          Acc<T> g[N];
          load_row(gradients + (begin + o) * split.n + i, g);
#pragma unroll
          for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            const Acc<T> w = weight[o][r];
            if (w == Acc<T>(0)) continue;  // 0 times inf is NaN
#pragma unroll
            for (int l = 0; l < N; ++l) acc[r][l] = multiply_add(w, g[l], acc[r][l]);
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; ++r)
          if (r < count) store_at_once(static_cast<T*>(rows.out[group + r]) + i, acc[r]);
      });
      begin += OUTPUTS_AT_ONCE;
    } while (begin < stop);
  }
}

extern "C" int launch_dense_adjoint(int dtype, int64_t n, void* lam_out, void* start, void* const* extra,
                                    const void* lam, const void* gradients, const double* times, int64_t first,
                                    int64_t stop, int count, int degree, const double* weights,
                                    const double* end_weights, const StepRef* where, Launch on) {
  if (count < 0 || count > MAX_TERMS || degree < 0 || degree > MAX_DEGREE) return refuse("dense_adjoint");
  if (n == 0) return cudaSuccess;
  Cotangents rows{};
  rows.count = count + 2;
  rows.out[0] = lam_out;
  rows.out[1] = start;
  for (int j = 0; j < count; ++j) rows.out[2 + j] = extra[j];
  const int error = dispatch_real(dtype, &n, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      return INVALID_VALUE;  // a sum that continues in another batch would be rounded in between
    } else {
      Alignment alignment(LANES<T>);
      alignment.with(static_cast<const T*>(lam));
      for (int r = 0; r < rows.count; ++r) alignment.with(rows.out[r], sizeof(T));
      const Split split(n, LANES<T>, alignment.phase());
      return launch("dense_adjoint", dense_adjoint_kernel<T>, grid_for(split.work()), THREADS, on, split, rows,
                    static_cast<const T*>(lam), static_cast<const T*>(gradients), times, first, stop,
                    Polynomials<0>(count, degree, weights, end_weights), *where);
    }
  });
  return error == INVALID_VALUE ? refuse("dense_adjoint") : error;
}

}  // namespace node_cuda

// rk_finish: y1 = y0 + dt sum_j b_j k_j and the partial error dt sum_j e_j k_j in one pass, and the last stage's time.
// Reads y0 and the k_j with nonzero b_j or e_j, writes y1 and the error: count + 3 sizes of the state (8 for dopri5).
#include "common/combine.h"

namespace node_cuda {

template <class T, int S>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    rk_finish_kernel(Split split, T* y1, RealAcc<T>* error, const T* y0, const __grid_constant__ Terms<S> k,
                     const __grid_constant__ Terms<S> e, StepRef where, Slot slot) {
  Step step;
  if (!read_next(where, &step)) return;
  if (slot.time != nullptr && blockIdx.x == 0 && threadIdx.x == 0) write_time<T>(slot, step);
  const double dt = step.at.dt;
  for_each<T>(split, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> acc[N] = {}, err[N] = {};
    const auto add = [&](int j) {
      Acc<T> value[N];
      load(static_cast<const T*>(k.x[j]) + i, value);
      const Acc<T> w = static_cast<Acc<T>>(k.a[j]), v = static_cast<Acc<T>>(dt * e.a[j]);
#pragma unroll
      for (int l = 0; l < N; ++l) {
        // A stage may have a weight in only one of the sums, and 0 * inf is NaN. All threads take the same branch.
        if (k.a[j] != 0.0) acc[l] = multiply_add(w, value[l], acc[l]);
        if (e.a[j] != 0.0) err[l] = multiply_add(v, value[l], err[l]);
      }
    };
    if constexpr (S > 0) {
      // Two sums of 8 halves, or weights in double, or 6 floats and their weights at once need more than 64 registers.
      [[maybe_unused]] constexpr int AT_ONCE = sizeof(T) == 2 ? 2 : sizeof(T) == 8 ? 3 : S < 6 ? S : 4;
#pragma unroll AT_ONCE
      for (int j = 0; j < S; ++j) add(j);
    } else {
#pragma unroll 4
      for (int j = 0; j < k.count; ++j) add(j);
    }
    add_to_base(acc, static_cast<Acc<T>>(dt * k.unit), y0, i);
    store(y1 + i, acc);
    if (error != nullptr) store(error + i, err);
  });
}

extern "C" int launch_rk_finish(int dtype, int64_t n, void* y1, void* error, const void* y0, int count,
                                const void* const* k, const double* b, const double* e, const StepRef* where,
                                const Slot* slot, Launch on) {
  // Without an error this is the same as a stage.
  if (error == nullptr)
    return combine("rk_finish", dtype, n, y1, y0, count, k, b, *where, slot == nullptr ? Slot{} : *slot, on);
  if (n == 0 && (slot == nullptr || slot->time == nullptr)) return cudaSuccess;
  const int result = dispatch_real(dtype, &n, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = RealAcc<T>;
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<T*>(y1)).with(static_cast<R*>(error)).with(static_cast<const T*>(y0));
    for (int j = 0; j < count; ++j) alignment.with(k[j], sizeof(T));
    const Split split(n, LANES<T>, alignment.phase());
    return dispatch_count(count, [&](auto stages) {
      constexpr int S = decltype(stages)::value;
      return launch("rk_finish", rk_finish_kernel<T, S>, grid_for(split.work()), THREADS, on, split,
                    static_cast<T*>(y1), static_cast<R*>(error), static_cast<const T*>(y0),
                    Terms<S>(count, k, b).in_units(), Terms<S>(count, k, e), *where, slot == nullptr ? Slot{} : *slot);
    });
  });
  return result == INVALID_VALUE ? refuse("rk_finish") : result;
}

}  // namespace node_cuda

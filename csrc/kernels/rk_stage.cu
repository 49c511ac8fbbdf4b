// rk_stage: z = y0 + dt sum_j a_j k_j, and the time of the stage for the field. Reads y0 and the k_j with a_j != 0,
// writes z: count + 2 sizes of the state.
#include "common/combine.h"

namespace node_cuda {

template <class T, int S>
__global__ void __launch_bounds__(THREADS)
    rk_stage_kernel(Split split, T* z, const T* y0, const __grid_constant__ Terms<S> k, StepRef where, Slot slot) {
  Step step;
  if (!read_next(where, &step)) return;
  if (slot.time != nullptr && blockIdx.x == 0 && threadIdx.x == 0) write_time<T>(slot, step);
  const Acc<T> scale = static_cast<Acc<T>>(step.at.dt * k.unit);
  Acc<T> w[S > 0 ? S : 1];
#pragma unroll
  for (int j = 0; j < S; ++j) w[j] = static_cast<Acc<T>>(k.a[j]);
  for_each<T>(split, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> acc[N] = {};
    if constexpr (S > 0) {
#pragma unroll
      for (int j = 0; j < S; ++j) add_term<T, N>(acc, k.x[j], w[j], i);
    } else {
#pragma unroll 4
      for (int j = 0; j < k.count; ++j) add_term<T, N>(acc, k.x[j], static_cast<Acc<T>>(k.a[j]), i);
    }
    add_to_base(acc, scale, y0, i);
    store(z + i, acc);
  });
}

int combine(const char* op, int dtype, int64_t n, void* out, const void* base, int count, const void* const* x,
            const double* a, const StepRef& where, const Slot& slot, Launch on) {
  if (n == 0 && slot.time == nullptr) return cudaSuccess;
  const int error = dispatch_real(dtype, &n, [&](auto type) {
    using T = typename decltype(type)::type;
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<T*>(out)).with(static_cast<const T*>(base));
    for (int j = 0; j < count; ++j) alignment.with(x[j], sizeof(T));
    const Split split(n, LANES<T>, alignment.phase());
    return dispatch_count(count, [&](auto stages) {
      constexpr int S = decltype(stages)::value;
      return launch(op, rk_stage_kernel<T, S>, grid_for(split.work()), THREADS, on, split, static_cast<T*>(out),
                    static_cast<const T*>(base), Terms<S>(count, x, a).in_units(), where, slot);
    });
  });
  return error == INVALID_VALUE ? refuse(op) : error;
}

extern "C" int launch_rk_stage(int dtype, int64_t n, void* z, const void* y0, int count, const void* const* k,
                               const double* a, const StepRef* where, const Slot* slot, Launch on) {
  return combine("rk_stage", dtype, n, z, y0, count, k, a, *where, slot == nullptr ? Slot{} : *slot, on);
}

}  // namespace node_cuda

// initial_norms and initial_change: the norms of Hairer's starting step, and the control that follows from them.
// initial_norms reads y0 and f0 (2 sizes of the state), initial_change y0, f0 and f1 (3).
#include "common/reduce.h"
#include "common/scale.h"

namespace node_cuda {

// The scale atol + rtol |y0|.
template <class T, int N>
__device__ inline void initial_scale(const T* y0, const Scale<T>& tolerance, int64_t i, Acc<T> (&y)[N],
                                     RealAcc<T> (&scale)[N]) {
  load(y0 + i, y);
#pragma unroll
  for (int l = 0; l < N; ++l) scale[l] = magnitude(y[l]);
  tolerance.apply(scale, i);
}

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    initial_norms_kernel(int64_t n, int phase, const T* y0, const T* f0, Scale<T> tolerance, Segments segments,
                         Partials partials, double* norms, ControllerState* ctl) {
  double of_y = 0.0, of_f = 0.0;
  for_share<LANES<T>>(share_of_block(segments, n), phase, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> y[N], f[N];
    RealAcc<T> scale[N];
    initial_scale<T, N>(y0, tolerance, i, y, scale);
    load(f0 + i, f);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      of_y += square_of_quotient(y[l], scale[l]);
      of_f += square_of_quotient(f[l], scale[l]);
    }
  });
  of_y = block_sum(of_y);
  of_f = block_sum(of_f);
  if (threadIdx.x == 0) {
    partials.values[2 * static_cast<int64_t>(blockIdx.x)] = of_y;
    partials.values[2 * static_cast<int64_t>(blockIdx.x) + 1] = of_f;
  }
  if (!last_block(partials.ticket)) return;
  const double d0 = largest_rms(segments, n, partials.values, 2);
  const double d1 = largest_rms(segments, n, partials.values + 1, 2);
  if (threadIdx.x != 0) return;
  if (norms != nullptr) norms[0] = d0, norms[1] = d1;
  if (ctl != nullptr) initial_probe(*ctl, d0, d1);
}

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    initial_change_kernel(int64_t n, int phase, const T* y0, const T* f0, const T* f1, Scale<T> tolerance,
                          Segments segments, Partials partials, double* norms, ControllerState* ctl, ControllerParams law) {
  double sum = 0.0;
  for_share<LANES<T>>(share_of_block(segments, n), phase, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> y[N], a[N], b[N];
    RealAcc<T> scale[N];
    initial_scale<T, N>(y0, tolerance, i, y, scale);
    load(f0 + i, a);
    load(f1 + i, b);
#pragma unroll
    for (int l = 0; l < N; ++l) sum += square_of_quotient(add_scaled(b[l], RealAcc<T>(-1), a[l]), scale[l]);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials.values[blockIdx.x] = sum;
  if (!last_block(partials.ticket)) return;
  const double change = largest_rms(segments, n, partials.values, 1);
  if (threadIdx.x != 0) return;
  if (norms != nullptr) norms[0] = change;
  if (ctl != nullptr) initial_step(*ctl, law, change);
}

extern "C" int launch_initial_norms(int dtype, int64_t n, const void* y0, const void* f0, const Tolerance* tolerance,
                                    const Segments* segments, void* workspace, double* norms, ControllerState* ctl, Launch on) {
  const int error = dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Scale<T> scale(*tolerance);
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<const T*>(y0)).with(static_cast<const T*>(f0));
    align_scale(alignment, scale);
    return launch("initial_norms", initial_norms_kernel<T>, reduce_grid(n, segments), THREADS, on, n, alignment.phase(),
                  static_cast<const T*>(y0), static_cast<const T*>(f0), scale,
                  segments == nullptr ? Segments{1, nullptr, nullptr} : *segments, Partials(workspace), norms, ctl);
  });
  return error == INVALID_VALUE ? refuse("initial_norms") : error;
}

extern "C" int launch_initial_change(int dtype, int64_t n, const void* y0, const void* f0, const void* f1,
                                     const Tolerance* tolerance, const Segments* segments, void* workspace,
                                     double* norms, ControllerState* ctl, const ControllerParams* law, Launch on) {
  const int error = dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Scale<T> scale(*tolerance);
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<const T*>(y0)).with(static_cast<const T*>(f0)).with(static_cast<const T*>(f1));
    align_scale(alignment, scale);
    return launch("initial_change", initial_change_kernel<T>, reduce_grid(n, segments), THREADS, on, n,
                  alignment.phase(), static_cast<const T*>(y0), static_cast<const T*>(f0), static_cast<const T*>(f1),
                  scale, segments == nullptr ? Segments{1, nullptr, nullptr} : *segments, Partials(workspace), norms,
                  ctl, law == nullptr ? ControllerParams{} : *law);
  });
  return error == INVALID_VALUE ? refuse("initial_change") : error;
}

}  // namespace node_cuda

// scaled_error: (error + dt e_last k_last) / (atol + rtol max(|y0|, |y1|)) for each element, for a norm of the user.
// Reads the partial error, k_last, y0 and y1, writes the quotient: 5 sizes of the state.
#include "common/launch.h"
#include "common/scale.h"

namespace node_cuda {

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    scaled_error_kernel(Split split, Error<T>* out, const Error<T>* error, const T* last, double e_last, const T* y0,
                        const T* y1, Scale<T> tolerance, StepRef where) {
  Step step;
  if (!read_next(where, &step)) return;
  const RealAcc<T> w = static_cast<RealAcc<T>>(step.at.dt * e_last);
  for_each<T>(split, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> e[N];
    RealAcc<T> scale[N];
    error_and_scale<T, N>(error, last, w, y0, y1, tolerance, i, e, scale);
#pragma unroll
    for (int l = 0; l < N; ++l) e[l] = divided(e[l], scale[l]);
    store(out + i, e);
  });
}

extern "C" int launch_scaled_error(int dtype, int64_t n, void* out, const void* error, const void* last, double e_last,
                                   const void* y0, const void* y1, const Tolerance* tolerance, const StepRef* where,
                                   Launch on) {
  if (n == 0) return cudaSuccess;
  const int result = dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Scale<T> scale(*tolerance);
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<Error<T>*>(out)).with(static_cast<const Error<T>*>(error));
    alignment.with(static_cast<const T*>(last)).with(static_cast<const T*>(y0)).with(static_cast<const T*>(y1));
    align_scale(alignment, scale);
    const Split split(n, LANES<T>, alignment.phase());
    return launch("scaled_error", scaled_error_kernel<T>, grid_for(split.work()), THREADS, on, split,
                  static_cast<Error<T>*>(out), static_cast<const Error<T>*>(error), static_cast<const T*>(last), e_last,
                  static_cast<const T*>(y0), static_cast<const T*>(y1), scale, *where);
  });
  return result == INVALID_VALUE ? refuse("scaled_error") : result;
}

}  // namespace node_cuda

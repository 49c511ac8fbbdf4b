// error_ratio: max over segments of rms |error + dt e_last k_last| / (atol + rtol max(|y0|, |y1|)), and step control.
// Reads the partial error, k_last, y0 and y1, writes nothing of the state's size: 4 sizes of the state.
#include "common/reduce.h"
#include "common/scale.h"

namespace node_cuda {

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    error_ratio_kernel(int64_t n, int phase, const Error<T>* error, const T* last, double e_last, const T* y0,
                       const T* y1, Scale<T> tolerance, Segments segments, Partials partials, StepRef where,
                       Finish finish) {
  // Read before the ticket: the block that finishes last changes ctl, after all the others have read it.
  Step step;
  if (!read_next(where, &step)) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && finish.ctl != nullptr) step_control(*finish.ctl, finish.law, 0.0);
    return;
  }
  const Share share = share_of_block(segments, n);
  const RealAcc<T> w = static_cast<RealAcc<T>>(step.at.dt * e_last);
  double sum = 0.0;
  for_share<LANES<T>>(share, phase, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> e[N];
    RealAcc<T> scale[N];
    error_and_scale<T, N>(error, last, w, y0, y1, tolerance, i, e, scale);
#pragma unroll
    for (int l = 0; l < N; ++l) sum += square_of_quotient(e[l], scale[l]);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials.values[blockIdx.x] = sum;
  if (!last_block(partials.ticket)) return;
  const double norm = largest_rms(segments, n, partials.values, 1);
  if (threadIdx.x == 0) finish_norm(finish, norm);
}

extern "C" int64_t reduce_workspace(int64_t n, const Segments* segments) {
  return 16 + 2 * static_cast<int64_t>(sizeof(double)) * reduce_grid(n, segments);
}

extern "C" int launch_error_ratio(int dtype, int64_t n, const void* error, const void* last, double e_last,
                                  const void* y0, const void* y1, const Tolerance* tolerance, const Segments* segments,
                                  void* workspace, const StepRef* where, const Finish* finish, Launch on) {
  const int result = dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Scale<T> scale(*tolerance);
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<const Error<T>*>(error)).with(static_cast<const T*>(last));
    alignment.with(static_cast<const T*>(y0)).with(static_cast<const T*>(y1));
    align_scale(alignment, scale);
    return launch("error_ratio", error_ratio_kernel<T>, reduce_grid(n, segments), THREADS, on, n, alignment.phase(),
                  static_cast<const Error<T>*>(error), static_cast<const T*>(last), e_last, static_cast<const T*>(y0),
                  static_cast<const T*>(y1), scale, segments == nullptr ? Segments{1, nullptr, nullptr} : *segments,
                  Partials(workspace), *where, *finish);
  });
  return result == INVALID_VALUE ? refuse("error_ratio") : result;
}

}  // namespace node_cuda

// sums_ratio: max over a list of rms error_i / (atol + rtol max(|total_i|, |total_i + sum_i|)), and step control.
// Reads the errors, sums and totals: 3 sizes of the parameters.
#include "common/parts.h"
#include "common/scale.h"

namespace node_cuda {

// The sum of the squares of a chunk, over the elements of this thread. T: the type of the sums.
template <class T>
__device__ inline double squares(const Part& part, int64_t begin, double rtol, double atol) {
  const T* const error = static_cast<const T*>(part.error);
  const T* const sum = static_cast<const T*>(part.sum);
  const T* const total = static_cast<const T*>(part.total);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(error) | reinterpret_cast<uintptr_t>(sum) | reinterpret_cast<uintptr_t>(total);
  const int64_t end = begin + CHUNK < part.size ? begin + CHUNK : part.size;
  double squared = 0.0;
  const Share share{begin, end, 0, 1};
  for_share<LANES<T>>(share, addresses % 16 == 0 ? 0 : -1, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    T e[N], s[N], t[N];
    load(error + i, e);
    load(sum + i, s);
    load(total + i, t);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const RealAcc<T> size = larger(magnitude(t[l]), magnitude(sum_of(t[l], s[l])));
      squared += square_of_quotient(
          e[l], multiply_add(static_cast<RealAcc<T>>(rtol), size, static_cast<RealAcc<T>>(atol)));
    }
  });
  return squared;
}

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    sums_ratio_kernel(const Part* parts, int64_t count, double rtol, double atol, Partials partials, const ControllerState* ctl,
                      Finish finish) {
  __shared__ double of_warp[THREADS / 32];
  if (ctl != nullptr && !ctl->active) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && finish.ctl != nullptr) step_control(*finish.ctl, finish.law, 0.0);
    return;
  }
  double sum = 0.0;
  if (count > 0) {
    const int64_t chunk = blockIdx.x;
    const Part part = parts[part_of(parts, count, chunk)];
    dispatch_part(part.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (part.size > 0) sum = squares<Acc<T>>(part, (chunk - part.first_chunk) * CHUNK, rtol, atol);
    });
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials.values[blockIdx.x] = sum;
  if (!last_block(partials.ticket)) return;
  // One warp for each tensor; it adds the tensor's chunks in a fixed order.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double norm = 0.0;
  for (int64_t i = warp; i < count; i += THREADS / 32) {
    const int64_t size = parts[i].size, first = parts[i].first_chunk;
    double of_part = 0.0;
    for (int64_t c = lane; c < chunk_count(size); c += 32) of_part += __ldcg(partials.values + first + c);
    of_part = warp_sum(of_part);
    if (size > 0) norm = nan_max(norm, sqrt(of_part / static_cast<double>(size)));
  }
  if (lane == 0) of_warp[warp] = norm;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < THREADS / 32; ++w) norm = nan_max(norm, of_warp[w]);
  finish_norm(finish, norm);
}

extern "C" int64_t sums_workspace(int64_t chunks) {
  return 16 + static_cast<int64_t>(sizeof(double)) * (chunks > 0 ? chunks : 1);
}

extern "C" int launch_sums_ratio(const Part* parts, int64_t count, int64_t chunks, double rtol, double atol,
                                 void* workspace, const ControllerState* ctl, const Finish* finish, Launch on) {
  return launch("sums_ratio", sums_ratio_kernel, chunks > 0 ? chunks : 1, THREADS, on, parts, count, rtol, atol,
                Partials(workspace), ctl, *finish);
}

}  // namespace node_cuda

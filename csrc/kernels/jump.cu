// jump: a += g and dot = Re sum conj(g) f in one pass, when the backward solve passes an output. Reads a, g and f,
// writes a: 4 sizes of the state.
#include "common/reduce.h"

namespace node_cuda {

// Re conj(g) f: products of floats are exact in double.
__device__ inline double real_product(double g, double f) { return g * f; }
template <class R>
__device__ inline double real_product(Complex<R> g, Complex<R> f) {
  return static_cast<double>(g.re) * f.re + static_cast<double>(g.im) * f.im;
}

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    jump_kernel(int64_t n, int phase, T* a, const T* g, const T* f, double* dot, Partials partials) {
  double sum = 0.0;
  const Share share{0, n, blockIdx.x, gridDim.x};
  for_share<LANES<T>>(share, phase, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> of_g[N], other[N];
    load(g + i, of_g);
    if (f != nullptr) {
      load(f + i, other);
#pragma unroll
      for (int l = 0; l < N; ++l) sum += real_product(of_g[l], other[l]);
    }
    if (a != nullptr) {
      load(a + i, other);
#pragma unroll
      for (int l = 0; l < N; ++l) other[l] = sum_of(other[l], of_g[l]);
      store(a + i, other);
    }
  });
  if (dot == nullptr) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials.values[blockIdx.x] = sum;
  if (!last_block(partials.ticket)) return;
  sum = 0.0;
  for (int64_t b = threadIdx.x; b < gridDim.x; b += blockDim.x) sum += __ldcg(partials.values + b);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *dot = sum;
}

extern "C" int launch_jump(int dtype, int64_t n, void* a, const void* g, const void* f, double* dot, void* workspace,
                           Launch on) {
  if (n == 0 && dot == nullptr) return cudaSuccess;
  const int error = dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<T*>(a)).with(static_cast<const T*>(g)).with(static_cast<const T*>(f));
    return launch("jump", jump_kernel<T>, reduce_grid(n, nullptr), THREADS, on, n, alignment.phase(),
                  static_cast<T*>(a), static_cast<const T*>(g), static_cast<const T*>(f), dot, Partials(workspace));
  });
  return error == INVALID_VALUE ? refuse("jump") : error;
}

}  // namespace node_cuda

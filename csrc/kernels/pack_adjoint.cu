// pack_adjoint: row = [f, -vjp], the derivative of the flat state [y, a] of the continuous adjoint.
// Reads f and vjp, writes the row: 4 sizes of the state, in one launch.
#include "common/launch.h"
#include "common/vec.h"

namespace node_cuda {

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    pack_adjoint_kernel(Split split, T* row, const T* f, const T* vjp) {
  T* const second = row + split.n;
  for_each<T>(split, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    Acc<T> x[N], a[N] = {};
    load(f + i, x);
    if (vjp != nullptr) load(vjp + i, a);
#pragma unroll
    for (int l = 0; l < N; ++l) a[l] = vjp == nullptr ? a[l] : -a[l];
    store(row + i, x);
    store(second + i, a);
  });
}

extern "C" int launch_pack_adjoint(int dtype, int64_t n, void* row, const void* f, const void* vjp, Launch on) {
  if (n == 0) return cudaSuccess;
  const int error = dispatch_real(dtype, &n, [&](auto type) {
    using T = typename decltype(type)::type;
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<T*>(row)).with(static_cast<T*>(row) + n);
    alignment.with(static_cast<const T*>(f)).with(static_cast<const T*>(vjp));
    const Split split(n, LANES<T>, alignment.phase());
    return launch("pack_adjoint", pack_adjoint_kernel<T>, grid_for(split.work()), THREADS, on, split,
                  static_cast<T*>(row), static_cast<const T*>(f), static_cast<const T*>(vjp));
  });
  return error == INVALID_VALUE ? refuse("pack_adjoint") : error;
}

}  // namespace node_cuda

// Lists of tensors of mixed sizes and dtypes in one launch. They are divided into chunks, one for each block.
#pragma once
#include "common/reduce.h"

namespace node_cuda {

constexpr int64_t CHUNK = 4096;  // elements

NODE_CUDA_HD inline int64_t chunk_count(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// The tensor that contains a chunk: the last one that begins at or before it (empty tensors have no chunk).
__device__ inline int64_t part_of(const Part* parts, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (parts[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

// f(Type<T>{}) on the device, for the type of a tensor of the list.
template <class F>
__device__ inline void dispatch_part(int64_t dtype, F f) {
  switch (dtype) {
    case FLOAT: return f(Type<float>{});
    case DOUBLE: return f(Type<double>{});
    case HALF: return f(Type<__half>{});
    case BFLOAT16: return f(Type<__nv_bfloat16>{});
    case COMPLEX_FLOAT: return f(Type<Complex<float>>{});
    default: return f(Type<Complex<double>>{});
  }
}

// The real type of T, and the number of reals in an element: sums treat complex numbers as pairs of reals.
template <class T>
struct Linear {
  using type = T;
  static constexpr int count = 1;
};
template <class R>
struct Linear<Complex<R>> {
  using type = R;
  static constexpr int count = 2;
};

}  // namespace node_cuda

// 16-byte access to tensors of any alignment.
//
// Elementwise kernels access scalars up to the first aligned element, then vectors, and scalars at the end. This needs
// the same misalignment for all tensors. Otherwise (or for slices) every access is scalar.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace node_cuda {

// The elements that a thread accesses at once.
template <class T>
constexpr int LANES = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T v[N];
};

template <int N>
struct Width {
  static constexpr int value = N;
};

template <int N, class T>
__device__ inline void load(const T* p, Acc<T> (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = to_acc(*p);
  } else {
    const Vec<T, N> raw = *reinterpret_cast<const Vec<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_acc(raw.v[i]);
  }
}

template <int N, class T>
__device__ inline void store(T* p, const Acc<T> (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_acc<T>(x[0]);
  } else {
    Vec<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.v[i] = from_acc<T>(x[i]);
    *reinterpret_cast<Vec<T, N>*>(p) = raw;
  }
}

// The same as an explicit vector store: nvcc turns a plain one into scalar stores.
template <int N, class T>
__device__ inline void store_at_once(T* p, const Acc<T> (&x)[N]) {
#ifdef __CUDA_ARCH__
  if constexpr (N > 1) {
    Vec<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.v[i] = from_acc<T>(x[i]);
    __stwb(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(raw));
    return;
  }
#endif
  store(p, x);
}

// The elements where every tensor can be read 16 bytes at a time: those that are phase() modulo `lanes`.
class Alignment {
 public:
  explicit Alignment(int lanes) : lanes_(lanes), possible_((1u << lanes) - 1) {}

  Alignment& with(const void* p, int64_t element_size) {
    if (p == nullptr) return *this;
    for (int i = 0; i < lanes_; ++i)
      if ((reinterpret_cast<uintptr_t>(p) + i * element_size) % 16) possible_ &= ~(1u << i);
    return *this;
  }
  template <class T>
  Alignment& with(const T* p) {
    return with(p, sizeof(T));
  }

  // -1: there are none.
  int phase() const {
    for (int i = 0; i < lanes_; ++i)
      if (possible_ >> i & 1) return i;
    return -1;
  }

 private:
  int lanes_;
  unsigned possible_;
};

// n elements as `head` scalars, `vectors` vectors, and the remaining scalars.
struct Split {
  int64_t n, head, vectors, scalars;

  Split(int64_t n, int lanes, int phase) : n(n), head(phase < 0 || phase > n ? n : phase) {
    vectors = lanes == 1 ? 0 : (n - head) / lanes;
    scalars = n - vectors * lanes;
  }
  int64_t work() const { return vectors > scalars ? vectors : scalars; }
};

// body(Width<N>, i) for every group of N elements from i on; N is the number of lanes, or 1.
template <class T, class Body>
__device__ inline void for_each(const Split& split, Body body) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if constexpr (LANES<T> > 1)
    for (int64_t v = thread; v < split.vectors; v += stride) body(Width<LANES<T>>{}, split.head + v * LANES<T>);
  for (int64_t s = thread; s < split.scalars; s += stride)
    body(Width<1>{}, s < split.head ? s : split.n - split.scalars + s);
}

}  // namespace node_cuda

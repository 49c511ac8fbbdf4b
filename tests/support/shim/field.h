// A field as a kernel, for tests that capture a step: dy/dt = 3 cos(4 t) y - y^2.
#pragma once
#include "common/dtype.h"
#include "common/launch.h"

namespace node_cuda {

template <class T>
__global__ void field_kernel(int64_t n, T* f, const T* t, const T* y) {
  const T swing = static_cast<T>(3) * std::cos(static_cast<T>(4) * *t);
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    f[i] = swing * y[i] - y[i] * y[i];
}

inline int launch_field(int dtype, int64_t n, void* f, const void* t, const void* y, Launch on) {
  const auto with = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch("field", field_kernel<T>, 2, 64, on, n, static_cast<T*>(f), static_cast<const T*>(t),
                  static_cast<const T*>(y));
  };
  return dtype == FLOAT ? with(Type<float>{}) : dtype == DOUBLE ? with(Type<double>{}) : refuse("field");
}

}  // namespace node_cuda

// The element types: the types that they are converted to for arithmetic, and the dispatch from a Dtype to them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "launchers.h"

namespace node_cuda {

// The same layout as in torch. Only norms and dot products use complex numbers; for linear kernels they are two real
// numbers.
template <class R>
struct Complex {
  R re, im;
};

template <class T>
struct Traits {  // float, double
  using Acc = T;
  using Real = T;
};
template <>
struct Traits<__half> {
  using Acc = float;
  using Real = __half;
};
template <>
struct Traits<__nv_bfloat16> {
  using Acc = float;
  using Real = __nv_bfloat16;
};
template <class R>
struct Traits<Complex<R>> {
  using Acc = Complex<R>;
  using Real = R;
};
template <class T>
using Acc = typename Traits<T>::Acc;
template <class T>
using Real = typename Traits<T>::Real;
template <class T>
using RealAcc = Acc<Real<T>>;

template <class T>
__device__ inline Acc<T> to_acc(T x) {
  return x;
}
template <>
__device__ inline float to_acc(__half x) {
  return __half2float(x);
}
template <>
__device__ inline float to_acc(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ inline T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ inline __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One rounding on the device and with g++, for any setting of contraction in the compilers' flags.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
__device__ inline float magnitude(Complex<float> x) { return hypotf(x.re, x.im); }
__device__ inline double magnitude(Complex<double> x) { return hypot(x.re, x.im); }

// The larger number, or NaN if either is NaN: torch.maximum.
template <class R>
__device__ inline R larger(R a, R b) {
  return a != a || a > b ? a : b;
}

// e + w k for a real weight.
template <class R>
__device__ inline R add_scaled(R e, R w, R k) {
  return multiply_add(w, k, e);
}
template <class R>
__device__ inline Complex<R> add_scaled(Complex<R> e, R w, Complex<R> k) {
  return {multiply_add(w, k.re, e.re), multiply_add(w, k.im, e.im)};
}

__device__ inline float sum_of(float a, float b) { return a + b; }
__device__ inline double sum_of(double a, double b) { return a + b; }
template <class R>
__device__ inline Complex<R> sum_of(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class R>
__device__ inline R divided(R x, R scale) {
  return x / scale;
}
template <class R>
__device__ inline Complex<R> divided(Complex<R> x, R scale) {
  return {x.re / scale, x.im / scale};
}

// |x / scale|^2 as a double; the division is in the accumulation type, as in the reference.
template <class R>
__device__ inline double square_of_quotient(R x, R scale) {
  const double q = x / scale;
  return q * q;
}
template <class R>
__device__ inline double square_of_quotient(Complex<R> x, R scale) {
  return square_of_quotient(x.re, scale) + square_of_quotient(x.im, scale);
}

template <class T>
struct Type {
  using type = T;
};

constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue

// f(Type<T>{}) for the type of a Dtype.
template <class F>
int dispatch(int dtype, F f) {
  switch (dtype) {
    case FLOAT: return f(Type<float>{});
    case HALF: return f(Type<__half>{});
#ifndef NODE_CUDA_FEW_TYPES  // set in sanitizer builds, which take long to compile
    case DOUBLE: return f(Type<double>{});
    case BFLOAT16: return f(Type<__nv_bfloat16>{});
    case COMPLEX_FLOAT: return f(Type<Complex<float>>{});
    case COMPLEX_DOUBLE: return f(Type<Complex<double>>{});
#endif
    default: return INVALID_VALUE;
  }
}

// The same for kernels that are linear over the reals: a complex tensor is a real one of twice the size.
template <class F>
int dispatch_real(int dtype, int64_t* n, F f) {
  if (dtype == COMPLEX_FLOAT || dtype == COMPLEX_DOUBLE) *n *= 2;
  switch (dtype) {
    case FLOAT:
    case COMPLEX_FLOAT: return f(Type<float>{});
    case HALF: return f(Type<__half>{});
#ifndef NODE_CUDA_FEW_TYPES
    case DOUBLE:
    case COMPLEX_DOUBLE: return f(Type<double>{});
    case BFLOAT16: return f(Type<__nv_bfloat16>{});
#endif
    default: return INVALID_VALUE;
  }
}

}  // namespace node_cuda

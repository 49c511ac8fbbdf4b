// The scale of the error, atol + rtol |y|, from numbers or from one number for each element.
#pragma once
#include "common/vec.h"

namespace node_cuda {

// A Tolerance in the form that the kernels read.
template <class T>
struct Scale {
  RealAcc<T> rtol, atol;
  const Real<T>* rtol_each;
  const Real<T>* atol_each;

  explicit Scale(const Tolerance& t)
      : rtol(static_cast<RealAcc<T>>(t.rtol)),
        atol(static_cast<RealAcc<T>>(t.atol)),
        rtol_each(static_cast<const Real<T>*>(t.rtol_each)),
        atol_each(static_cast<const Real<T>*>(t.atol_each)) {}

  // scale[l] = atol + rtol size[l] for the elements from i on, in place.
  template <int N>
  __device__ void apply(RealAcc<T> (&size)[N], int64_t i) const {
    RealAcc<T> r[N], a[N];
#pragma unroll
    for (int l = 0; l < N; ++l) r[l] = rtol, a[l] = atol;
    if (rtol_each != nullptr) load(rtol_each + i, r);
    if (atol_each != nullptr) load(atol_each + i, a);
#pragma unroll
    for (int l = 0; l < N; ++l) size[l] = multiply_add(r[l], size[l], a[l]);
  }
};

template <class T>
void align_scale(Alignment& alignment, const Scale<T>& scale) {
  alignment.with(scale.rtol_each).with(scale.atol_each);
}

// The type of the error; complex for complex states.
template <class T>
using Error = Acc<T>;

// error + w last, and the scale atol + rtol max(|y0|, |y1|), for N elements from i on.
template <class T, int N>
__device__ inline void error_and_scale(const Error<T>* error, const T* last, RealAcc<T> w, const T* y0, const T* y1,
                                       const Scale<T>& tolerance, int64_t i, Acc<T> (&e)[N], RealAcc<T> (&scale)[N]) {
  load(error + i, e);
  if (last != nullptr) {
    Acc<T> k[N];
    load(last + i, k);
#pragma unroll
    for (int l = 0; l < N; ++l) e[l] = add_scaled(e[l], w, k[l]);
  }
  Acc<T> a[N], b[N];
  load(y0 + i, a);
  load(y1 + i, b);
#pragma unroll
  for (int l = 0; l < N; ++l) scale[l] = larger(magnitude(a[l]), magnitude(b[l]));
  tolerance.apply(scale, i);
}

}  // namespace node_cuda

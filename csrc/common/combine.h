// Linear combinations of tensors, shared by rk_stage, rk_finish and the sums of the adjoint.
#pragma once
#include "common/launch.h"
#include "common/vec.h"

namespace node_cuda {

// The coefficients of a row and their tensors, by value. S: their number; 0: up to MAX_TERMS, and `count` is the
// number.
template <int S>
struct Terms {
  static constexpr int CAPACITY = S > 0 ? S : MAX_TERMS;
  const void* x[CAPACITY];
  double a[CAPACITY];
  double unit = 1.0;
  int count;

  Terms(int count, const void* const* x_, const double* a_) : count(count) {
    for (int j = 0; j < count; ++j) {
      x[j] = x_[j];
      a[j] = a_ == nullptr ? 1.0 : a_[j];
    }
  }

  // The same row divided by its first nonzero coefficient: unit * a. A sum then needs its scale only once.
  Terms& in_units() {
    int first = 0;
    while (first < count && a[first] == 0.0) ++first;
    if (first < count) unit = a[first];
    for (int j = 0; j < count; ++j) a[j] /= unit;
    return *this;
  }
};

// f(Width<S>{}) with the number of terms as a constant up to 7, which covers methods of order 5; 0 for more or none.
template <class F>
int dispatch_count(int count, F f) {
  switch (count) {
#ifndef NODE_CUDA_FEW_TYPES
    case 1: return f(Width<1>{});
    case 2: return f(Width<2>{});
    case 3: return f(Width<3>{});
    case 4: return f(Width<4>{});
    case 5: return f(Width<5>{});
    case 6: return f(Width<6>{});
#endif
    case 7: return f(Width<7>{});
    default: return count < 0 || count > MAX_TERMS ? INVALID_VALUE : f(Width<0>{});
  }
}

// acc += w x for the N elements from i on.
template <class T, int N>
__device__ inline void add_term(Acc<T> (&acc)[N], const void* x, Acc<T> w, int64_t i) {
  Acc<T> value[N];
  load(static_cast<const T*>(x) + i, value);
#pragma unroll
  for (int l = 0; l < N; ++l) acc[l] = multiply_add(w, value[l], acc[l]);
}

// acc = base + scale acc for the N elements from i on; base null: 0. The base is added last, so that only one rounding
// error has the size of the base: `combine` of kernels/reference.py.
template <class T, int N>
__device__ inline void add_to_base(Acc<T> (&acc)[N], Acc<T> scale, const T* base, int64_t i) {
  Acc<T> start[N] = {};
  if (base != nullptr) load(base + i, start);
#pragma unroll
  for (int l = 0; l < N; ++l) acc[l] = multiply_add(scale, acc[l], start[l]);
}

// The next number above or below x.
__device__ inline float neighbour(float x, bool up) { return nextafterf(x, up ? INFINITY : -INFINITY); }
__device__ inline double neighbour(double x, bool up) {
  return nextafter(x, static_cast<double>(up ? INFINITY : -INFINITY));
}
__device__ inline unsigned short neighbour_bits(unsigned short bits, bool up) {
  if ((bits & 0x7fff) == 0) return up ? 0x0001 : 0x8001;
  return ((bits >> 15) != 0) == up ? bits - 1 : bits + 1;
}
__device__ inline __half neighbour(__half x, bool up) {
  return __ushort_as_half(neighbour_bits(__half_as_ushort(x), up));
}
__device__ inline __nv_bfloat16 neighbour(__nv_bfloat16 x, bool up) {
  return __ushort_as_bfloat16(neighbour_bits(__bfloat16_as_ushort(x), up));
}

// Clock of kernels/stage_times.py: the stage's time in the user's time.
template <class R>
__device__ inline void write_time(const Slot& slot, const Step& step) {
  R time = from_acc<R>(static_cast<Acc<R>>(node_time(step.at, slot.c)));
  if (slot.side < 0 && slot.c == 1.0) time = neighbour(time, false);
  if (slot.side > 0 && slot.c == 0.0) time = neighbour(time, true);
  *static_cast<R*>(slot.time) = from_acc<R>(static_cast<Acc<R>>(step.direction) * to_acc(time));
}

// out = base + scale sum_j a_j x_j (base null: 0), with dt as the scale; defined in rk_stage.cu.
int combine(const char* op, int dtype, int64_t n, void* out, const void* base, int count, const void* const* x,
            const double* a, const StepRef& where, const Slot& slot, Launch on);

}  // namespace node_cuda

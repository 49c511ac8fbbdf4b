// dense_eval: all outputs in a step, y0 + P(x) (y1 - y0) + dt sum_j B_j(x) k_j, computed directly from y0 and k. Reads
// y0 and the k_j once for up to 64 outputs (y1 if P or an output at t1 needs it), writes the outputs.
#include "common/polynomials.h"

namespace node_cuda {

// Returns `raw` unchanged, but nvcc cannot know this. So it does not convert all halves to floats before the loop over
// outputs, where they would need twice the registers.
template <class T, int N>
__device__ inline Vec<T, N> as_in_memory(Vec<T, N> raw) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2 && N > 1) {
    unsigned(&w)[4] = reinterpret_cast<Vec<unsigned, 4>&>(raw).v;
    asm volatile("" : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]));
  }
#endif
  return raw;
}

// The rows of the output may have any alignment, independent of y0 and k.
template <class T, int N>
__device__ inline void store_row(T* p, const Acc<T> (&x)[N]) {
  if constexpr (N > 1) {
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      store_at_once(p, x);  // for sm_80 to sm_90
      return;
    }
  }
#pragma unroll
  for (int l = 0; l < N; ++l) p[l] = from_acc<T>(x[l]);
}

template <class T, int S>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    dense_eval_kernel(Split split, T* out, const double* times, int64_t first, int64_t stop, const T* y0, const T* y1,
                      const __grid_constant__ Terms<S> k, const __grid_constant__ Polynomials<S> polynomials,
                      StepRef where) {
  __shared__ Acc<T> weight[OUTPUTS_AT_ONCE][Terms<S>::CAPACITY + 1];
  __shared__ bool at_end[OUTPUTS_AT_ONCE];
  if (where.ctl != nullptr) {
    if (!where.ctl->accept) return;
    first = where.ctl->first_output;
    stop = where.ctl->next_output;
  }
  const int terms = S > 0 ? S : k.count;
  for (int64_t begin = first; begin < stop; begin += OUTPUTS_AT_ONCE) {
    const int outputs = static_cast<int>(stop - begin < OUTPUTS_AT_ONCE ? stop - begin : OUTPUTS_AT_ONCE);
    // read each time, because keeping it would need registers
    const Interval at = where.ctl == nullptr ? where.at : where.ctl->last;
    __syncthreads();  // wait until the last use of the weights is over
    for (int q = threadIdx.x; q < outputs * (terms + 1); q += blockDim.x) {
      const int o = q / (terms + 1), j = q % (terms + 1);
      const double time = times[begin + o], x = position(at, time);
      if (j < terms) {
        weight[o][j] = static_cast<Acc<T>>(at.dt * evaluate(polynomials.weight[j], polynomials.degree, x));
      } else {
        weight[o][terms] =
            polynomials.has_end ? static_cast<Acc<T>>(evaluate(polynomials.end, polynomials.degree, x)) : Acc<T>(0);
        at_end[o] = time == at.t1;
      }
    }
    __syncthreads();
    for_each<T>(split, [&](auto width, int64_t i) {
      constexpr int N = decltype(width)::value;
      const Vec<T, N> start = *reinterpret_cast<const Vec<T, N>*>(y0 + i);
      [[maybe_unused]] Vec<T, N> raw[S > 0 ? S : 1];
#pragma unroll
      for (int j = 0; j < S; ++j)
        raw[j] = *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(k.x[j]) + i);
#pragma unroll 1  // several outputs at once would need too many registers
      for (int o = 0; o < outputs; ++o) {
        Acc<T> acc[N] = {};
        if (at_end[o]) {
          load(y1 + i, acc);
        } else {
          if (S == 0 && polynomials.has_end) {
            load(y1 + i, acc);
#pragma unroll
            for (int l = 0; l < N; ++l) acc[l] = weight[o][terms] * (acc[l] - to_acc(start.v[l]));
          }
          if constexpr (S > 0) {
#pragma unroll
            for (int j = 0; j < S; ++j) {
              const Vec<T, N> x = as_in_memory(raw[j]);
#pragma unroll
              for (int l = 0; l < N; ++l) acc[l] = multiply_add(weight[o][j], to_acc(x.v[l]), acc[l]);
            }
          } else {
#pragma unroll 4
            for (int j = 0; j < terms; ++j) add_term<T, N>(acc, k.x[j], weight[o][j], i);
          }
#pragma unroll
          for (int l = 0; l < N; ++l) acc[l] = to_acc(start.v[l]) + acc[l];
        }
        store_row<T, N>(out + (begin + o) * split.n + i, acc);
      }
    });
  }
}

// The default interpolants (bosh3, dopri5, tsit5) have their counts as constants. The others, and all with P, read k
// again for each output, from the cache.
template <class F>
int dispatch_terms(int count, bool has_end, F f) {
  switch (has_end ? 0 : count) {
#ifndef NODE_CUDA_FEW_TYPES
    case 4: return f(Width<4>{});
    case 6: return f(Width<6>{});
#endif
    case 7: return f(Width<7>{});
    default: return count < 0 || count > MAX_TERMS ? INVALID_VALUE : f(Width<0>{});
  }
}

extern "C" int launch_dense_eval(int dtype, int64_t n, void* out, const double* times, int64_t first, int64_t stop,
                                 const void* y0, const void* y1, int count, int degree, const void* const* k,
                                 const double* weights, const double* end_weights, const StepRef* where, Launch on) {
  if (degree < 0 || degree > MAX_DEGREE) return refuse("dense_eval");
  if (n == 0 || (where->ctl == nullptr && first >= stop)) return cudaSuccess;
  const int error = dispatch_real(dtype, &n, [&](auto type) {
    using T = typename decltype(type)::type;
    Alignment alignment(LANES<T>);
    alignment.with(static_cast<const T*>(y0)).with(static_cast<const T*>(y1));
    for (int j = 0; j < count; ++j) alignment.with(k[j], sizeof(T));
    const Split split(n, LANES<T>, alignment.phase());
    return dispatch_terms(count, end_weights != nullptr, [&](auto terms) {
      constexpr int S = decltype(terms)::value;
      const Polynomials<S> polynomials(count, degree, weights, end_weights);
      return launch("dense_eval", dense_eval_kernel<T, S>, grid_for(split.work()), THREADS, on, split,
                    static_cast<T*>(out), times, first, stop, static_cast<const T*>(y0), static_cast<const T*>(y1),
                    Terms<S>(count, k, nullptr), polynomials, *where);
    });
  });
  return error == INVALID_VALUE ? refuse("dense_eval") : error;
}

}  // namespace node_cuda

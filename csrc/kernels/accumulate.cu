// accumulate: sum_i (+)= w x_i and error_i (+)= v x_i over a whole list of tensors in one launch. Reads x and (to add)
// the sums, writes the sums: 3 sizes of the parameters, 5 with the errors, 2 and 3 to set. commit_sums: total_i +=
// sum_i if the step was accepted: 3 sizes of the parameters.
#include "common/parts.h"

namespace node_cuda {

// The tensors of the list in one launch, by value.
struct Pointers {
  const void* x[MAX_POINTERS];
};

struct Weights {
  double sum, error;
  int add;
};

template <class R, int N>
__device__ inline void set_or_add(R* to, const R (&x)[N], R w, int add) {
  R acc[N] = {};
  if (add) load(to, acc);
#pragma unroll
  for (int l = 0; l < N; ++l) acc[l] = add ? multiply_add(w, x[l], acc[l]) : w * x[l];
  store(to, acc);
}

template <class T>
__device__ inline void accumulate_chunk(const Part& part, const T* x, int64_t begin, int64_t end,
                                        const Weights& weights) {
  using R = Acc<T>;
  constexpr int N = LANES<T>;
  R* const sum = static_cast<R*>(part.sum);
  R* const error = static_cast<R*>(part.error);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(sum) | reinterpret_cast<uintptr_t>(error);
  const auto add = [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    R value[W] = {};
    if (x != nullptr) load(x + i, value);
    if (weights.sum != 0.0) set_or_add(sum + i, value, static_cast<R>(weights.sum), weights.add);
    if (weights.error != 0.0 && error != nullptr)
      set_or_add(error + i, value, static_cast<R>(weights.error), weights.add);
  };
  for (int64_t i = begin + threadIdx.x * N; i < end; i += static_cast<int64_t>(blockDim.x) * N) {
    if (addresses % 16 == 0 && i + N <= end) {
      add(Width<N>{}, i);
    } else {
      for (int64_t j = i; j < i + N && j < end; ++j) add(Width<1>{}, j);
    }
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    accumulate_kernel(const Part* parts, int64_t count, int64_t first_chunk, const __grid_constant__ Pointers pointers,
                      Weights weights, int when_accepted, StepRef where) {
  if (when_accepted) {
    if (where.ctl != nullptr && !where.ctl->accept) return;
  } else {
    Step step;
    if (!read_next(where, &step)) return;
    weights.sum *= step.at.dt;
    weights.error *= step.at.dt;
  }
  const int64_t chunk = first_chunk + blockIdx.x, i = part_of(parts, count, chunk);
  const Part part = parts[i];
  const void* const x = pointers.x[i];
  if (x == nullptr && weights.add) return;
  dispatch_part(part.dtype, [&](auto type) {
    using L = Linear<typename decltype(type)::type>;
    const int64_t begin = (chunk - part.first_chunk) * CHUNK, end = begin + CHUNK;
    accumulate_chunk(part, static_cast<const typename L::type*>(x), begin * L::count,
                     (end < part.size ? end : part.size) * L::count, weights);
  });
}

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    commit_sums_kernel(const Part* parts, int64_t count, const ControllerState* ctl) {
  if (ctl != nullptr && !ctl->accept) return;
  const int64_t chunk = blockIdx.x;
  Part part = parts[part_of(parts, count, chunk)];
  const void* const sum = part.sum;
  part.sum = part.total;
  part.error = nullptr;
  dispatch_part(part.dtype, [&](auto type) {
    using L = Linear<typename decltype(type)::type>;
    using R = Acc<typename L::type>;
    const int64_t begin = (chunk - part.first_chunk) * CHUNK, end = begin + CHUNK;
    accumulate_chunk(part, static_cast<const R*>(sum), begin * L::count,
                     (end < part.size ? end : part.size) * L::count, Weights{1.0, 0.0, 1});
  });
}

extern "C" int64_t chunks_of(int64_t size) { return chunk_count(size); }

extern "C" int launch_accumulate(const Part* parts, int64_t count, int64_t chunks, const int64_t* host_first_chunks,
                                 const void* const* x, double weight, double error_weight, int add,
                                 int when_accepted, const StepRef* where, Launch on) {
  const Weights weights{weight, error_weight, add};
  Pointers pointers{};
  for (int64_t first = 0; first < count; first += MAX_POINTERS) {
    const int64_t stop = first + MAX_POINTERS < count ? first + MAX_POINTERS : count;
    for (int64_t i = first; i < stop; ++i) pointers.x[i - first] = x[i];
    const int64_t begin = first == 0 ? 0 : host_first_chunks[first];
    const int64_t end = stop == count ? chunks : host_first_chunks[stop];
    const int error = launch("accumulate", accumulate_kernel, end - begin, THREADS, on, parts + first, stop - first,
                             begin, pointers, weights, when_accepted, *where);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

extern "C" int launch_commit_sums(const Part* parts, int64_t count, int64_t chunks, const ControllerState* ctl, Launch on) {
  return launch("commit_sums", commit_sums_kernel, chunks, THREADS, on, parts, count, ctl);
}

}  // namespace node_cuda

// The function that launches every kernel: it sets and restores the device, checks the launch and stores its name for
// the message.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/device_guard.h"
#include "control/control.h"
#include "launchers.h"

// The tests' shim replaces these two macros, and nothing else, to run the same kernels without a GPU.
#ifndef NODE_CUDA_LAUNCH
#define NODE_CUDA_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define NODE_CUDA_FUNCTION(kernel) reinterpret_cast<void*>(kernel)  // for a node of a graph
#endif

namespace node_cuda {

// Array arguments that a kernel indexes by a variable are marked __grid_constant__: without it every thread first
// copies them to local memory.
constexpr int THREADS = 256;
constexpr int BLOCKS_AT_ONCE = 4;  // on a multiprocessor; at most 64 registers (without it ptxas spills more often)
#ifdef NODE_CUDA_MAX_BLOCKS  // small in tests, so that the loops run more than once for small sizes
constexpr int64_t MAX_BLOCKS = NODE_CUDA_MAX_BLOCKS;
#else
constexpr int64_t MAX_BLOCKS = 1 << 20;
#endif

// The name of the launch in this thread that failed last.
inline thread_local const char* last_failed_op = "";

inline int64_t blocks_for(int64_t work, int64_t a_block) { return (work + a_block - 1) / a_block; }

// The number of blocks of THREADS threads for `work` groups of elements, one for each thread. It depends only on the
// work.
inline int64_t grid_for(int64_t work) {
  const int64_t blocks = blocks_for(work, THREADS);
  return blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks < 1 ? 1 : blocks;
}

template <class... P, class... A>
int launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, Launch on, const A&... arguments) {
  if (blocks <= 0) return cudaSuccess;
  const DeviceGuard guard(on.device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    const auto stream = static_cast<cudaStream_t>(on.stream);
    NODE_CUDA_LAUNCH(kernel, static_cast<unsigned>(blocks), threads, stream, arguments...);
    error = cudaGetLastError();
  } else {
    cudaGetLastError();  // clears the error, so that a later check does not report it again
  }
  if (error != cudaSuccess) last_failed_op = op;
  return error;
}

// Returned by a launcher for arguments that it does not support.
inline int refuse(const char* op) {
  last_failed_op = op;
  return 1;  // cudaErrorInvalidValue
}

// The step that a kernel works on; false: the solve has ended, so the kernel does nothing.
struct Step {
  Interval at;
  double direction;
};

__device__ inline bool read_next(const StepRef& where, Step* step) {
  if (where.ctl == nullptr) {
    *step = Step{where.at, where.direction};
    return true;
  }
  *step = Step{where.ctl->next, where.ctl->direction};
  return where.ctl->active;
}

}  // namespace node_cuda

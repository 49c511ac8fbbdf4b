// Runs the kernels of csrc/ on the CPU: the part of CUDA that g++ needs to compile the same .cu files.
//
// A CUDA thread is a fiber. A block runs its fibers in turn and switches at barriers and shuffles. Blocks run one after
// another in an order shuffled by a seed; with several workers they also run at the same time. The sanitizers know the
// fibers: the thread sanitizer finds a race between two CUDA threads although one host thread runs both. The other CUDA
// headers in this folder include this file.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_graphs.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_UNWATCHED __attribute__((no_sanitize("thread")))  // the shim's own data, not data of a kernel
#else
#define SHIM_UNWATCHED
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // a host thread runs one block at a time

// --- the functions of the runtime that are needed ------------------------------------------------------------------

namespace shim {
inline int device = 0, device_count = 2;
inline int next_error = 0;     // the error of the next launch
inline int launches = 0;       // the number of launches so far
inline int launch_device = 0;  // of the last launch
inline void* launch_stream = nullptr;
inline uint64_t seed = 0;  // shuffles the order of the blocks; 0: ascending
inline int workers = 1;    // host threads that run blocks
}  // namespace shim

inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::device_count) return static_cast<cudaError_t>(101);
  shim::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const int error = shim::next_error;
  shim::next_error = 0;
  return static_cast<cudaError_t>(error);
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheShim"; }
inline const char* cudaGetErrorString(cudaError_t) { return "as the test requests"; }

// --- threads and blocks ----------------------------------------------------------------------------------------

struct shim_index {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local shim_index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  void* sanitizer = nullptr;
};

struct Barrier {
  unsigned arrived = 0, round = 0;
};

// One host thread and the block that it runs.
struct Worker {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::function<void()> body;
  unsigned alive = 0, current = 0;
  uint64_t progress = 0;
  Barrier block;
  Barrier warps[32];
  unsigned alive_in_warp[32];
  double lanes[2][1024];
  int64_t between_blocks = 0;  // an address by which the thread sanitizer orders blocks
};
inline thread_local Worker worker;

SHIM_UNWATCHED inline void switch_to_scheduler(bool for_good) {
  Worker& w = worker;
  Fiber& self = w.fibers[w.current];
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(w.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, w.scheduler_stack, w.scheduler_stack_size);
#endif
  swapcontext(&self.context, &w.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &worker.scheduler_stack, &worker.scheduler_stack_size);
#endif
  (void)for_good;
}

SHIM_UNWATCHED inline void switch_to_fiber(unsigned i) {
  Worker& w = worker;
  w.current = i;
  threadIdx.x = i;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(w.fibers[i].sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, w.fibers[i].stack.get(), STACK);
#endif
  swapcontext(&w.scheduler, &w.fibers[i].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

SHIM_UNWATCHED inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.round;
  ++worker.progress;
}

// Waits until `expected` threads have arrived; threads that returned are not expected.
SHIM_UNWATCHED inline void wait(Barrier& barrier, const unsigned& expected) {
  const unsigned round = barrier.round;
  ++worker.progress;
  if (++barrier.arrived == expected) return release(barrier);
  while (barrier.round == round) switch_to_scheduler(false);
}

SHIM_UNWATCHED inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &worker.scheduler_stack, &worker.scheduler_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&worker.between_blocks);
#endif
  worker.body();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&worker.between_blocks);
#endif
  Worker& w = worker;
  const unsigned warp = w.current / WARP;
  w.fibers[w.current].done = true;
  ++w.progress;
  if (--w.alive > 0 && w.block.arrived == w.alive) release(w.block);
  if (--w.alive_in_warp[warp] > 0 && w.warps[warp].arrived == w.alive_in_warp[warp]) release(w.warps[warp]);
  switch_to_scheduler(true);
}

SHIM_UNWATCHED inline void run_block(unsigned threads) {
  Worker& w = worker;
  if (w.fibers.size() < threads) w.fibers = std::vector<Fiber>(threads);
  w.alive = threads;
  w.block = Barrier{};
  for (unsigned i = 0; i < 32; ++i) {
    w.warps[i] = Barrier{};
    w.alive_in_warp[i] = threads >= (i + 1) * WARP ? WARP : threads > i * WARP ? threads - i * WARP : 0;
  }
#if defined(__SANITIZE_THREAD__)
  w.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = w.fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#if defined(__SANITIZE_THREAD__)
    if (fiber.sanitizer == nullptr) fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&w.between_blocks);
#endif
  while (w.alive > 0) {
    const uint64_t before = w.progress;
    for (unsigned i = 0; i < threads; ++i)
      if (!w.fibers[i].done) switch_to_fiber(i);
    if (w.progress == before) {
      std::fprintf(stderr, "shim: a block waits for a thread that never comes to its barrier or shuffle\n");
      std::abort();
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&w.between_blocks);
#endif
}

SHIM_UNWATCHED inline void run_blocks(const std::vector<unsigned>& order, unsigned first, unsigned every,
                                      unsigned threads, const std::function<void()>& body) {
  worker.body = body;
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(order.size());
  for (size_t i = first; i < order.size(); i += every) {
    blockIdx.x = order[i];
    run_block(threads);
  }
}

// Host threads that run blocks at the same time. They are kept between launches, because fibers are slow to make with
// the sanitizers, and are not joined at the end of the process.
class Pool {
 public:
  void run(unsigned count, const std::function<void(unsigned)>& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (; size_ < count; ++size_) std::thread([this, i = size_, seen = round_] { serve(i, seen); }).detach();
    job_ = &job;
    count_ = remaining_ = count;
    ++round_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return remaining_ == 0; });
  }

 private:
  void serve(unsigned i, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (i >= count_) continue;
      lock.unlock();
      (*job_)(i);
      lock.lock();
      if (--remaining_ == 0) changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(unsigned)>* job_ = nullptr;
  unsigned size_ = 0, count_ = 0, remaining_ = 0;
  uint64_t round_ = 0;
};
inline Pool& pool = *new Pool;

inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  if (seed != 0) {
    std::mt19937_64 random(seed);
    for (unsigned b = blocks; b > 1; --b) std::swap(order[b - 1], order[random() % b]);
  }
  const unsigned count = std::min<unsigned>(workers, blocks);
  if (count <= 1) return run_blocks(order, 0, 1, threads, body);
  pool.run(count, [&](unsigned i) { run_blocks(order, i, count, threads, body); });
}

inline void launch(unsigned blocks, unsigned threads, cudaStream_t stream, const std::function<void()>& body) {
  if (next_error != 0) return;
  ++launches;
  launch_device = device;
  launch_stream = stream;
  submit(stream, {cudaGraphNodeTypeKernel, [=] { run_grid(blocks, threads, body); }});
}

// The address of a kernel, with the data that a graph node needs to call it.
template <class... P>
void* function(void (*kernel)(P...)) {
  return know_function(
      reinterpret_cast<void*>(kernel), [](void* address, void** arguments, unsigned blocks, unsigned threads) {
        return [&]<size_t... I>(std::index_sequence<I...>) -> std::function<void()> {
          const auto kernel = reinterpret_cast<void (*)(P...)>(address);
          const std::tuple<P...> copied(*static_cast<P*>(arguments[I])...);
          return [=] { run_grid(blocks, threads, [=] { std::apply(kernel, copied); }); };
        }(std::index_sequence_for<P...>{});
      });
}

}  // namespace shim

#define NODE_CUDA_FUNCTION(kernel) shim::function(kernel)
#define NODE_CUDA_LAUNCH(kernel, blocks, threads, stream, ...) \
  shim::launch(blocks, threads, stream, [=] { kernel(__VA_ARGS__); })

SHIM_UNWATCHED inline void __syncthreads() {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&shim::worker.block);
#endif
  shim::wait(shim::worker.block, shim::worker.alive);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&shim::worker.block);
#endif
}

// The thread sanitizer does not support fences. The atomics below order all accesses that need it.
inline void __threadfence() {
#if !defined(__SANITIZE_THREAD__)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

// All lanes of a warp exchange a number: that of lane `from` of this warp, or the lane's own number if `from` is past
// the warp.
SHIM_UNWATCHED inline double shim_exchange(double value, unsigned from) {
  shim::Worker& w = shim::worker;
  const unsigned self = w.current, warp = self / shim::WARP;
  // two sets, so that a fast lane does not overwrite the number of a slow one
  double* slots = w.lanes[w.warps[warp].round % 2];
  slots[self] = value;
  shim::wait(w.warps[warp], w.alive_in_warp[warp]);
  return from < shim::WARP ? slots[warp * shim::WARP + from] : value;
}
inline double __shfl_down_sync(unsigned, double value, int by) {
  return shim_exchange(value, shim::worker.current % shim::WARP + by);
}
inline double __shfl_xor_sync(unsigned, double value, int mask) {
  return shim_exchange(value, (shim::worker.current % shim::WARP) ^ mask);
}

inline unsigned atomicInc(unsigned* p, unsigned most) {
  unsigned old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &old, old >= most ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

template <class T>
inline T __ldcg(const T* p) {
  return *p;
}

// --- half and bfloat16 -----------------------------------------------------------------------------------------

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half{bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16{bits}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return __nv_bfloat16{0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
  return __nv_bfloat16{static_cast<unsigned short>(bits >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return __half{0x7fff};
  const float size = std::fabs(x);
  if (size == 0.0f) return __half{sign};
  if (size >= 65520.0f) return __half{static_cast<unsigned short>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  exponent = exponent < -13 ? -13 : exponent;  // the exponent of the smallest normal number, 2^-14
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // ties to even; 2048 carries
  return __half{static_cast<unsigned short>(sign | (((exponent + 13) << 10) + units))};
}

// Sums with the same bits every time: in double, in an order that depends on the sizes alone.
//
// A block sums its share of a segment by a tree and writes one partial sum. The block that finishes last adds the
// partial sums in the order of the blocks. An integer ticket, which the last block resets, tells which block that is.
// No float atomics.
#pragma once
#include "common/launch.h"
#include "common/vec.h"

namespace node_cuda {

constexpr int64_t REDUCE_ELEMENTS = 2048;  // for each block
#ifdef NODE_CUDA_MAX_BLOCKS
constexpr int64_t MAX_REDUCE_BLOCKS = NODE_CUDA_MAX_BLOCKS;
#else
constexpr int64_t MAX_REDUCE_BLOCKS = 1024;  // for each segment; about as many as fill a large GPU once
#endif

NODE_CUDA_HD inline int64_t reduce_blocks(int64_t size) {
  const int64_t blocks = (size + REDUCE_ELEMENTS - 1) / REDUCE_ELEMENTS;
  return blocks > MAX_REDUCE_BLOCKS ? MAX_REDUCE_BLOCKS : blocks;
}

inline int64_t reduce_grid(int64_t n, const Segments* segments) {
  if (segments == nullptr || segments->count <= 1) return reduce_blocks(n) > 0 ? reduce_blocks(n) : 1;
  int64_t blocks = 0, begin = 0;
  for (int64_t s = 0; s < segments->count; begin = segments->host_ends[s++])
    blocks += reduce_blocks(segments->host_ends[s] - begin);
  return blocks > 0 ? blocks : 1;
}

// The data of a reduction in its workspace.
struct Partials {
  unsigned* ticket;
  double* values;

  explicit Partials(void* workspace)
      : ticket(static_cast<unsigned*>(workspace)),
        values(reinterpret_cast<double*>(static_cast<char*>(workspace) + 16)) {}
};

__device__ inline int64_t segment_end(const Segments& segments, int64_t n, int64_t s) {
  return segments.count <= 1 ? n : segments.ends[s];
}

// The share of this block: elements [begin, end) of one segment, which `blocks` blocks divide.
struct Share {
  int64_t begin, end, block, blocks;
};

__device__ inline Share share_of_block(const Segments& segments, int64_t n) {
  int64_t begin = 0, block = blockIdx.x;
  for (int64_t s = 0; s < (segments.count <= 1 ? 1 : segments.count); ++s) {
    const int64_t end = segment_end(segments, n, s), blocks = reduce_blocks(end - begin);
    if (block < blocks) return Share{begin, end, block, blocks};
    block -= blocks;
    begin = end;
  }
  return Share{0, 0, 0, 1};
}

// body(Width<N>, i) over a share. The elements of a thread do not depend on their alignment. Alignment only decides
// whether a thread reads them in one load. So the bits of the sum do not depend on it either.
template <int LANES_, class Body>
__device__ inline void for_share(const Share& share, int phase, Body body) {
  const int64_t stride = share.blocks * blockDim.x * LANES_;
  const bool aligned = phase >= 0 && (share.begin - phase) % LANES_ == 0;
  for (int64_t i = share.begin + (share.block * blockDim.x + threadIdx.x) * LANES_; i < share.end; i += stride) {
    if (aligned && i + LANES_ <= share.end) {
      body(Width<LANES_>{}, i);
    } else {
      for (int64_t j = i; j < i + LANES_ && j < share.end; ++j) body(Width<1>{}, j);
    }
  }
}

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over a block of THREADS threads, in its thread 0.
__device__ inline double block_sum(double x) {
  __shared__ double of_warp[THREADS / 32];
  x = warp_sum(x);
  __syncthreads();  // wait until the last use of of_warp is over
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) x = warp_sum(threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : 0.0);
  return x;
}

// Called by all threads after thread 0 wrote the block's partial sums: is this the block that finishes last?
__device__ inline bool last_block(unsigned* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// max over segments of sqrt(sum / size), in thread 0; partials lie `stride` apart.
__device__ inline double largest_rms(const Segments& segments, int64_t n, const double* partials, int stride) {
  double norm = 0.0;
  int64_t begin = 0, first = 0;
  for (int64_t s = 0; s < (segments.count <= 1 ? 1 : segments.count); ++s) {
    const int64_t end = segment_end(segments, n, s), blocks = reduce_blocks(end - begin);
    if (blocks > 0) {
      double sum = 0.0;
      for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) sum += __ldcg(partials + (first + b) * stride);
      sum = block_sum(sum);
      norm = nan_max(norm, sqrt(sum / static_cast<double>(end - begin)));
    }
    first += blocks;
    begin = end;
  }
  return norm;
}

// Used by one thread at the end, with the norm.
__device__ inline void finish_norm(const Finish& finish, double norm) {
  for (int64_t i = 0; i < finish.also_count; ++i) norm = nan_max(norm, finish.also[i]);
  if (finish.result != nullptr) *finish.result = norm;
  if (finish.ctl != nullptr) step_control(*finish.ctl, finish.law, norm);
}

}  // namespace node_cuda

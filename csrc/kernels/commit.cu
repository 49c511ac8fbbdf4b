// commit: to = from for the few tensors of an accepted step, where pointers cannot be swapped (the device loop). Reads
// and writes each once: 4 sizes of the state for y1 -> y0 and k_last -> k_1.
#include "common/launch.h"
#include "common/vec.h"

namespace node_cuda {

struct Copies {
  void* to[MAX_COPIES];
  const void* from[MAX_COPIES];
  int count;
};

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    commit_kernel(Split split, const __grid_constant__ Copies copies, const ControllerState* ctl) {
  if (ctl != nullptr && !ctl->accept) return;
  for_each<unsigned char>(split, [&](auto width, int64_t i) {
    using Bytes = std::conditional_t<decltype(width)::value == 1, unsigned char, Vec<uint64_t, 2>>;
    for (int c = 0; c < copies.count; ++c)
      *reinterpret_cast<Bytes*>(static_cast<unsigned char*>(copies.to[c]) + i) =
          *reinterpret_cast<const Bytes*>(static_cast<const unsigned char*>(copies.from[c]) + i);
  });
}

extern "C" int launch_commit(int64_t bytes, int count, void* const* to, const void* const* from, const ControllerState* ctl,
                             Launch on) {
  if (count < 0 || count > MAX_COPIES) return refuse("commit");
  if (bytes == 0 || count == 0) return cudaSuccess;
  Copies copies{};
  copies.count = count;
  Alignment alignment(LANES<unsigned char>);
  for (int c = 0; c < count; ++c) {
    copies.to[c] = to[c];
    copies.from[c] = from[c];
    alignment.with(to[c], 1).with(from[c], 1);
  }
  const Split split(bytes, LANES<unsigned char>, alignment.phase());
  return launch("commit", commit_kernel, grid_for(split.work()), THREADS, on, split, copies, ctl);
}

}  // namespace node_cuda

// stage_time: the times of stages that rk_stage does not compute, such as f(t0, y0) and the stages of fixed grids.
// Scalars only.
#include "common/combine.h"

namespace node_cuda {

struct Slots {
  Slot slot[MAX_SLOTS];
  int count;
};

template <class R>
__global__ void stage_time_kernel(const __grid_constant__ Slots slots, StepRef where) {
  Step step;
  if (!read_next(where, &step)) return;
  if (static_cast<int>(threadIdx.x) < slots.count) write_time<R>(slots.slot[threadIdx.x], step);
}

extern "C" int launch_stage_time(int dtype, int count, const Slot* slot, const StepRef* where, Launch on) {
  if (count < 0 || count > MAX_SLOTS) return refuse("stage_time");
  Slots slots{};
  slots.count = count;
  for (int i = 0; i < count; ++i) slots.slot[i] = slot[i];
  int64_t unused = 0;
  const int error = dispatch_real(dtype, &unused, [&](auto type) {
    using R = typename decltype(type)::type;
    return launch("stage_time", stage_time_kernel<R>, count > 0 ? 1 : 0, MAX_SLOTS, on, slots, *where);
  });
  return error == INVALID_VALUE ? refuse("stage_time") : error;
}

}  // namespace node_cuda

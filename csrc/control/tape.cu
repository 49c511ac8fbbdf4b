// The reverse pass over the tape of a solve: one thread, scalars only. control.h writes the tape when it judges a step.
#include "common/combine.h"

namespace node_cuda {

__global__ void begin_reverse_kernel(ControllerState* ctl, StepLog* tape) {
  const bool complete = tape->count <= tape->capacity;
  tape->row = complete ? tape->count : tape->capacity;  // always an existing row, even if there is no step to reverse
  ctl->status = complete ? SUCCESS : RECORD_FULL;
  ctl->active = complete && tape->count > 0;
}

template <class R>
__global__ void load_step_kernel(ControllerState* ctl, StepLog* tape, R* time) {
  if (!ctl->active) {  // a step that was launched after the end of the reverse pass
    ctl->accept = 0;
    ctl->first_output = ctl->next_output;
    return;
  }
  const Recorded step = tape->steps[--tape->row];
  ctl->next = ctl->last = step.at;
  ctl->first_output = step.first_output;
  ctl->next_output = step.next_output;
  ctl->accept = 1;
  if (time == nullptr) return;
  // A time just before t0 is the end of the step before. A time at t0 or just after it is the start of this step.
  const Interval start{step.at.t0, step.at.t0, 0.0, 0.0};
  write_time<R>(Slot{time, step.begins < 0 ? 1.0 : 0.0, step.begins}, Step{start, ctl->direction});
}

__global__ void advance_reverse_kernel(ControllerState* ctl, const StepLog* tape) { ctl->active = ctl->active && tape->row > 0; }

extern "C" int launch_begin_reverse(ControllerState* ctl, StepLog* tape, Launch on) {
  return launch("begin_reverse", begin_reverse_kernel, 1, 1, on, ctl, tape);
}

extern "C" int launch_load_step(int dtype, ControllerState* ctl, StepLog* tape, void* time, Launch on) {
  int64_t unused = 0;
  const int error = dispatch_real(dtype, &unused, [&](auto type) {
    using R = typename decltype(type)::type;
    return launch("load_step", load_step_kernel<R>, 1, 1, on, ctl, tape, static_cast<R*>(time));
  });
  return error == INVALID_VALUE ? refuse("load_step") : error;
}

extern "C" int launch_advance_reverse(ControllerState* ctl, const StepLog* tape, Launch on) {
  return launch("advance_reverse", advance_reverse_kernel, 1, 1, on, ctl, tape);
}

}  // namespace node_cuda

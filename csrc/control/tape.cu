// The walk back over the tape of a solve: one thread, scalars only. control.h writes the tape, as steps are judged.
#include "common/combine.h"

namespace node_cuda {

__global__ void set_walk_kernel(Ctl* ctl, Tape* tape) {
  const bool complete = tape->count <= tape->capacity;
  tape->row = complete ? tape->count : tape->capacity;  // a row that there is, also if no step is taken back
  ctl->status = complete ? SUCCESS : RECORD_FULL;
  ctl->active = complete && tape->count > 0;
}

template <class R>
__global__ void take_back_kernel(Ctl* ctl, Tape* tape, R* time) {
  if (!ctl->active) {  // a step that was launched before the end was known
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
  // Before t0 is the end of the step before, at t0 and after it the start of this one.
  const Interval start{step.at.t0, step.at.t0, 0.0, 0.0};
  write_time<R>(Slot{time, step.begins < 0 ? 1.0 : 0.0, step.begins}, Step{start, ctl->direction});
}

__global__ void taken_kernel(Ctl* ctl, const Tape* tape) { ctl->active = ctl->active && tape->row > 0; }

extern "C" int launch_set_walk(Ctl* ctl, Tape* tape, On on) {
  return launch("set_walk", set_walk_kernel, 1, 1, on, ctl, tape);
}

extern "C" int launch_take_back(int dtype, Ctl* ctl, Tape* tape, void* time, On on) {
  int64_t unused = 0;
  const int error = dispatch_real(dtype, &unused, [&](auto type) {
    using R = typename decltype(type)::type;
    return launch("take_back", take_back_kernel<R>, 1, 1, on, ctl, tape, static_cast<R*>(time));
  });
  return error == INVALID_VALUE ? refuse("take_back") : error;
}

extern "C" int launch_taken(Ctl* ctl, const Tape* tape, On on) {
  return launch("taken", taken_kernel, 1, 1, on, ctl, tape);
}

}  // namespace node_cuda

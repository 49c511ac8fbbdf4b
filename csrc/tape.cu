// The walk back over the tape of a solve: one thread, scalars only. control.h writes the tape, as steps are judged.
#include "combine.h"

namespace node_cuda {

__global__ void set_walk_kernel(Ctl* ctl, Tape* tape, int64_t next, int64_t row, int64_t least) {
  const bool own_rows = row < 0;
  const bool complete = tape->count <= tape->capacity && !(own_rows && tape->stride > 1);
  const int64_t n = next < 0 ? tape->count - 1 : next;
  tape->next = n;
  tape->own_rows = own_rows;
  tape->row = own_rows ? tape->slots : row;  // a row that there is, also if no step is taken back
  ctl->status = complete ? SUCCESS : RECORD_FULL;
  ctl->active = complete && n >= 0 && n >= least && n < tape->count;
}

template <class R>
__global__ void take_back_kernel(Ctl* ctl, Tape* tape, R* time) {
  if (!ctl->active) {  // a step that was launched before the end was known
    ctl->accept = 0;
    ctl->first_output = ctl->next_output;
    return;
  }
  const int64_t n = tape->next--;
  const Recorded step = tape->steps[n];
  ctl->next = ctl->last = step.at;
  ctl->first_output = step.first_output;
  ctl->next_output = step.next_output;
  ctl->accept = 1;
  if (tape->own_rows) tape->row = n;
  if (time == nullptr) return;
  // Before t0 is the end of the step before, at t0 and after it the start of this one.
  const Interval start{step.at.t0, step.at.t0, 0.0, 0.0};
  write_time<R>(Slot{time, step.begins < 0 ? 1.0 : 0.0, step.begins}, Step{start, ctl->direction});
}

__global__ void taken_kernel(Ctl* ctl, const Tape* tape, int64_t least) {
  ctl->active = ctl->active && tape->next >= 0 && tape->next >= least;
}

extern "C" int launch_set_walk(Ctl* ctl, Tape* tape, int64_t next, int64_t row, int64_t least, On on) {
  return launch("set_walk", set_walk_kernel, 1, 1, on, ctl, tape, next, row, least);
}

extern "C" int launch_take_back(int dtype, Ctl* ctl, Tape* tape, void* time, On on) {
  int64_t unused = 0;
  const int error = dispatch_real(dtype, &unused, [&](auto type) {
    using R = typename decltype(type)::type;
    return launch("take_back", take_back_kernel<R>, 1, 1, on, ctl, tape, static_cast<R*>(time));
  });
  return error == INVALID_VALUE ? refuse("take_back") : error;
}

extern "C" int launch_taken(Ctl* ctl, const Tape* tape, int64_t least, On on) {
  return launch("taken", taken_kernel, 1, 1, on, ctl, tape, least);
}

}  // namespace node_cuda

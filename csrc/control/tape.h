// The tape of a solve on the device: its accepted steps, in the order in which a walk back takes them from the end.
//
// Plain C++, as control.h, which writes the tape. The states that the steps begin with lie in `capacity` rows, and one
// more for what is not kept, of a tensor that the kernels here never see: they only say which row.
#pragma once
#include <cstddef>
#include <cstdint>

#include "control/interval.h"

namespace node_cuda {

// An accepted step, and the time at which the field gives its first stage: begins -1: just before t0, as the stage was
// carried on from the step before; 0: at t0; +1: just after t0, the step's inside (see kernels/stage_times.py).
struct Recorded {
  Interval at;
  int64_t first_output, next_output;  // the outputs in it, as in ControllerState
  int32_t begins, unused;
};

// Bytes from the front:
struct StepLog {
  Recorded* steps;   //   0  the first `capacity` of them; the state that one begins with lies in the row of its number
  int64_t capacity;  //   8
  int32_t first;     //  16  `begins` of the very first step
  int32_t carries;   //  20  1: later steps begin with a stage carried on, but beyond jumps; 0: as the first
  // The state, which start_control resets.
  int64_t count;     //  24  accepted steps, also those that are not recorded
  int64_t slot;      //  32  the row for the state that the step judged last began with; `capacity`: it is not kept
  int64_t row;       //  40  of the walk: the step taken back last, and the row of its state
  int32_t jumped;    //  48  the step accepted last ended at a discontinuity
  int32_t unused;    //  52
};
static_assert(sizeof(Recorded) == 56 && sizeof(StepLog) == 56, "the layout that Python reads and writes");
static_assert(offsetof(StepLog, slot) == 32 && offsetof(StepLog, row) == 40 && offsetof(StepLog, jumped) == 48, "as above");

NODE_CUDA_HD inline void start_step_log(StepLog* tape) {
  if (tape == nullptr) return;
  tape->count = 0;
  tape->slot = tape->capacity;
  tape->jumped = 0;
}

// The step judged last was not accepted, or there was none.
NODE_CUDA_HD inline void record_nothing(StepLog* tape) {
  if (tape != nullptr) tape->slot = tape->capacity;
}

// A step was accepted, with these outputs in it; jump: the field is discontinuous at its end.
NODE_CUDA_HD inline void record_step(StepLog* tape, const Interval& at, int64_t first_output, int64_t next_output,
                                     int32_t jump) {
  if (tape == nullptr) return;
  const int64_t i = tape->count++;
  tape->slot = i < tape->capacity ? i : tape->capacity;
  if (i < tape->capacity) {
    const int32_t later = tape->carries ? (tape->jumped ? 1 : -1) : tape->first;
    tape->steps[i] = Recorded{at, first_output, next_output, i == 0 ? tape->first : later, 0};
  }
  tape->jumped = jump;
}

}  // namespace node_cuda

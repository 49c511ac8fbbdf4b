// The tape of a solve on the device: its accepted steps in order. A reverse pass reads it from the end.
//
// This is plain C++, like control.h, which writes the tape. The states that the steps begin with are rows of a tensor:
// `capacity` rows, and one more row for states that are not kept. The code here only computes the number of the row.
#pragma once
#include <cstdint>

#include "control/interval.h"

namespace node_cuda {

// An accepted step, and the time of its first stage (see kernels/stage_times.py). begins = -1: just before t0, because
// it is the last stage of the step before. 0: at t0. +1: just after t0, inside the step.
struct Recorded {
  Interval at;
  int64_t first_output, next_output;  // the outputs in it, as in ControllerState
  int32_t begins, unused;
};

// Python makes it through bind/bind_structs.cpp, and uses `slot` and `row` as tensors.
struct StepLog {
  Recorded* steps;   // the first `capacity` steps; the state that step i began with is in row i
  int64_t capacity;
  int32_t first;     // `begins` of the very first step
  int32_t carries;   // 1: the first stage of later steps is the last one of the step before, except after jumps;
                     // 0: `first` holds for all steps
  // The state, which start_control resets.
  int64_t count;     // accepted steps, including those that are not recorded
  int64_t slot;      // the row for the state that the last judged step began with; `capacity`: it is not kept
  int64_t row;       // in a reverse pass: the last reversed step, and the row of its state
  int32_t jumped;    // the last accepted step ended at a discontinuity
  int32_t unused;
};

NODE_CUDA_HD inline void start_step_log(StepLog* tape) {
  if (tape == nullptr) return;
  tape->count = 0;
  tape->slot = tape->capacity;
  tape->jumped = 0;
}

// Record that the last judged step was not accepted, or that there was none.
NODE_CUDA_HD inline void record_nothing(StepLog* tape) {
  if (tape != nullptr) tape->slot = tape->capacity;
}

// Record an accepted step with these outputs in it. jump: the field is discontinuous at its end.
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

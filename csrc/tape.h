// The tape of a solve on the device: its accepted steps, which of their states are kept, and the walk back over them.
//
// Plain C++, as control.h, which writes the tape. The states themselves lie in `slots` rows, and one more for what is
// not kept, of a tensor that the kernels here never see: they only say which row.
#pragma once
#include <cstddef>
#include <cstdint>

#include "interval.h"

namespace node_cuda {

// An accepted step, and the time at which the field gives its first stage: begins -1: just before t0, as the stage was
// carried on from the step before; 0: at t0; +1: just after t0, the step's inside (see kernels/clock.py).
struct Recorded {
  Interval at;
  int64_t first_output, next_output;  // the outputs in it, as in Ctl
  int32_t begins, unused;
};

// Bytes from the front:
struct Tape {
  Recorded* steps;   //   0  the first `capacity` of them
  int64_t capacity;  //   8
  int64_t* places;   //  16  one a slot: the number of the step that began with its state
  int64_t slots;     //  24  at least 1
  int32_t first;     //  32  `begins` of the very first step
  int32_t carries;   //  36  1: later steps begin with a stage carried on, but beyond jumps; 0: as the first
  // The state, which start_control resets.
  int64_t count;     //  40  accepted steps, also those that are not recorded
  int64_t kept;      //  48  states in slots that are not to be used again
  int64_t stride;    //  56  the states of its multiples are kept
  int64_t scan;      //  64  the slots before this one are not to be used again
  int64_t slot;      //  72  the row for the state that the step judged last began with; `slots`: it is not kept
  // The walk.
  int64_t next;      //  80  the step to be taken back next
  int64_t row;       //  88  the row of the state that the step taken back last began with
  int32_t jumped;    //  96  (of the state) the step accepted last ended at a discontinuity
  int32_t own_rows;  // 100  (of the walk) the row of a step's state is its own number
};
static_assert(sizeof(Recorded) == 56 && sizeof(Tape) == 104, "the layout that Python reads and writes");
static_assert(offsetof(Tape, slot) == 72 && offsetof(Tape, row) == 88 && offsetof(Tape, jumped) == 96, "as above");

NODE_CUDA_HD inline void start_tape(Tape* tape) {
  if (tape == nullptr) return;
  tape->count = tape->kept = tape->scan = 0;
  tape->stride = 1;
  tape->slot = tape->slots;
  tape->jumped = 0;
}

// The step judged last was not accepted, or there was none.
NODE_CUDA_HD inline void record_nothing(Tape* tape) {
  if (tape != nullptr) tape->slot = tape->slots;
}

// The row for the state that step i begins with; called for every step in order. Checkpoints.offer of
// gradients/checkpoints.py for an unknown number of steps, in rows that stay where they are: where all are in use, only
// every other state is kept from then on, and the rows of the others are free, the front ones first.
NODE_CUDA_HD inline int64_t row_for(Tape& tape, int64_t i) {
  if (i % tape.stride) return tape.slots;
  if (tape.kept == tape.slots) {
    tape.stride *= 2;
    tape.kept = (tape.kept + 1) / 2;
    tape.scan = 0;
    if (i % tape.stride) return tape.slots;
  }
  int64_t row = tape.kept;
  if (tape.stride > 1) {
    while (tape.places[tape.scan] % tape.stride == 0) ++tape.scan;
    row = tape.scan++;
  }
  tape.places[row] = i;
  ++tape.kept;
  return row;
}

// A step was accepted, with these outputs in it; jump: the field is discontinuous at its end.
NODE_CUDA_HD inline void record_step(Tape* tape, const Interval& at, int64_t first_output, int64_t next_output,
                                     int32_t jump) {
  if (tape == nullptr) return;
  const int64_t i = tape->count++;
  if (i < tape->capacity) {
    const int32_t later = tape->carries ? (tape->jumped ? 1 : -1) : tape->first;
    tape->steps[i] = Recorded{at, first_output, next_output, i == 0 ? tape->first : later, 0};
  }
  tape->slot = row_for(*tape, i);
  tape->jumped = jump;
}

}  // namespace node_cuda

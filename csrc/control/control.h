// Step-size control, in double, on the device and (for tests) on the host. It has the functions of
// kernels/step_control.py.
//
// This is plain C++, because bind_structs.cpp includes it without CUDA. Times are solver times, ascending; the user's
// time is direction * t. Each expression has the order of operations of the Python code. Products that are added use
// mul(), which nvcc may not contract. So the device differs from Python only if pow differs.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "control/interval.h"
#include "control/tape.h"

namespace node_cuda {

// The values of node_cuda.status.Status.
enum Status : int32_t { SUCCESS = 0, STEP_UNDERFLOW = 1, NON_FINITE = 2, MAX_STEPS = 3, RECORD_FULL = 6 };

// The constants of a solve. The arrays are in the memory of the control: in device memory.
struct ControllerParams {
  double exponents[3];      // kernels.reference.ControllerParams.exponents
  double safety, ifactor, dfactor, min_step, max_step;
  double order;             // of the method, for the starting step
  int64_t max_num_steps;    // attempts allowed since the last output
  const double* tstops;     // step_t and jump_t, merged, ascending
  const uint8_t* is_jump;   // for each tstop: whether it is in jump_t
  const double* stops;      // times at which a step must end, without a very small step before them, ascending
  const double* outputs;    // the output times after the first, ascending; none: the host ends the solve
  int64_t tstop_count, stop_count, output_count;
  int32_t keep;             // an accepted step is never followed by a smaller one
  int32_t pauses;           // the loop stops at every output, until `resume`
  StepLog* tape;            // records the accepted steps; null: no tape
};

// The state of a solve, in device memory. start_control sets all members, most of them to zero. Python reads a copy
// through bind/bind_structs.cpp.
struct ControllerState {
  Interval next;         // the step to attempt: rk_stage, rk_finish, error_ratio and accumulate read it
  Interval last;         // the last judged step: dense_eval reads it
  double h;              // the next step before it was cut (callback_step gets it)
  double carried;        // the proposal before `next` was cut at a stop
  double ratio;          // the error ratio of `last`
  double history[2];     // the ratios of the last accepted steps
  double direction;      // +1 or -1
  double norms[2];       // d0 and d1 of the starting step
  int64_t attempts;      // since the last output
  int64_t accepted;
  int64_t rejected;
  int64_t next_tstop;    // the first element of each list that the solve has not passed
  int64_t next_stop;
  int64_t first_output;  // outputs [first_output, next_output) lie in `last`
  int64_t next_output;
  int32_t accept;        // `last` was accepted
  int32_t jump;          // the field is discontinuous at last.t1
  int32_t status;
  int32_t active;        // 0: the solve has ended, or pauses, and every kernel returns at once
  int32_t finite;        // `ratio` was finite
  int32_t paused;        // the solve waits for `resume`
};
static_assert(sizeof(Interval) == 32 && sizeof(ControllerParams) == 152, "the layout that bench/ writes");
static_assert(offsetof(ControllerParams, tstops) == 80 && offsetof(ControllerParams, tape) == 144, "as above");

NODE_CUDA_HD inline double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Python's max and min: the first argument, unless the second is strictly larger (smaller). For NaN they differ from
// fmax and fmin.
NODE_CUDA_HD inline double py_max(double a, double b) { return b > a ? b : a; }
NODE_CUDA_HD inline double py_min(double a, double b) { return b < a ? b : a; }
NODE_CUDA_HD inline bool is_finite(double x) { return x - x == 0.0; }

// The distance to the next larger number.
NODE_CUDA_HD inline double ulp(double x) { return nextafter(fabs(x), HUGE_VAL) - fabs(x); }

// The larger, or NaN if either is.
NODE_CUDA_HD inline double nan_max(double a, double b) { return a != a || a > b ? a : b; }

NODE_CUDA_HD inline double node_time(const Interval& at, double c) { return c == 1.0 ? at.t1 : at.t0 + mul(c, at.h); }

NODE_CUDA_HD inline void fail(ControllerState& ctl, double t, int32_t status) {
  ctl.status = status;
  ctl.active = 0;
  ctl.next = Interval{t, t, 0.0, 0.0};
}

// StepControl._cut: move the step's end to the next time that a step must end at.
NODE_CUDA_HD inline void cut(ControllerState& ctl, const ControllerParams& law, double t) {
  double h = ctl.h, t1 = t + h;
  ctl.carried = 0.0;
  while (ctl.next_tstop < law.tstop_count && law.tstops[ctl.next_tstop] <= t) ++ctl.next_tstop;
  const bool landed =
      ctl.next_tstop < law.tstop_count && law.tstops[ctl.next_tstop] <= t1 + mul(4.0, ulp(t1));
  if (landed) {
    t1 = law.tstops[ctl.next_tstop];
    h = py_min(t1 - t, h);
  }
  while (ctl.next_stop < law.stop_count && law.stops[ctl.next_stop] <= t) ++ctl.next_stop;
  const double stop = ctl.next_stop < law.stop_count ? law.stops[ctl.next_stop] : HUGE_VAL;
  if (t1 >= stop || (!landed && t + mul(2.0, h) > stop)) {
    ctl.carried = h;
    t1 = t1 >= stop ? stop : t + mul(0.5, stop - t);
    h = py_min(t1 - t, h);
  }
  ctl.next = Interval{t, t1, h, ctl.direction * h};
}

// StepControl._propose.
NODE_CUDA_HD inline void propose(ControllerState& ctl, const ControllerParams& law, double t) {
  if (!(t + ctl.h > t)) return fail(ctl, t, ctl.finite ? STEP_UNDERFLOW : NON_FINITE);
  if (ctl.attempts >= law.max_num_steps) return fail(ctl, t, MAX_STEPS);
  ++ctl.attempts;
  cut(ctl, law, t);
}

// kernels.reference.step_control: sets accept, h and history.
NODE_CUDA_HD inline void judge(ControllerState& ctl, const ControllerParams& law, double h, double ratio) {
  const bool finite = is_finite(ratio);
  const bool accept = (finite && ratio <= 1.0 && h <= law.max_step) || h <= law.min_step;
  double factor;
  if (!finite) {
    factor = law.dfactor;
  } else if (ratio == 0.0) {
    factor = law.ifactor;
  } else {
    factor = law.safety / pow(ratio, law.exponents[0]);
    if (law.exponents[1] != 0.0) factor *= pow(ctl.history[0], -law.exponents[1]);
    if (law.exponents[2] != 0.0) factor *= pow(ctl.history[1], -law.exponents[2]);
    const double least = law.keep && ratio < 1.0 ? 1.0 : law.dfactor;
    const double most = law.keep || accept ? law.ifactor : 1.0;
    factor = py_min(most, py_max(factor, least));
  }
  ctl.h = py_min(py_max(h * factor, law.min_step), law.max_step);
  if (accept) {
    ctl.history[1] = ctl.history[0];
    ctl.history[0] = finite ? py_max(ratio, 1e-4) : 1.0;
  }
  ctl.accept = accept;
  ctl.finite = finite;
}

// Passes the outputs that lie in the step just accepted. Returns false if the solve has ended at the last output, or
// pauses at an output.
NODE_CUDA_HD inline bool pass_outputs(ControllerState& ctl, const ControllerParams& law) {
  while (ctl.next_output < law.output_count && law.outputs[ctl.next_output] <= ctl.last.t1) ++ctl.next_output;
  if (ctl.next_output == ctl.first_output) return true;
  ctl.attempts = 0;
  const bool more = ctl.next_output < law.output_count;
  if (more && !law.pauses) return true;
  ctl.paused = more;
  ctl.active = 0;
  ctl.next = Interval{ctl.last.t1, ctl.last.t1, 0.0, 0.0};
  return false;
}

// Judge the step ctl.next, move, and propose the one after it.
NODE_CUDA_HD inline void step_control(ControllerState& ctl, const ControllerParams& law, double ratio) {
  ctl.first_output = ctl.next_output;
  record_nothing(law.tape);
  if (!ctl.active) {  // a step that was launched after the end of the solve: it changes nothing
    ctl.accept = 0;
    return;
  }
  ctl.last = ctl.next;
  ctl.ratio = ratio;
  ctl.jump = 0;
  judge(ctl, law, ctl.last.h, ratio);
  if (!ctl.accept) {
    ++ctl.rejected;
    return propose(ctl, law, ctl.last.t0);
  }
  if (!ctl.finite) {
    ctl.accept = 0;
    return fail(ctl, ctl.last.t0, NON_FINITE);
  }
  ctl.h = py_max(ctl.h, ctl.carried);
  ++ctl.accepted;
  // A step never passes the next tstop, so that is the only one that it can end at.
  ctl.jump = ctl.next_tstop < law.tstop_count && law.tstops[ctl.next_tstop] == ctl.last.t1 &&
             law.is_jump[ctl.next_tstop];
  const bool more = pass_outputs(ctl, law);
  record_step(law.tape, ctl.last, ctl.first_output, ctl.next_output, ctl.jump);
  if (more) propose(ctl, law, ctl.last.t1);
}

// Begin at t0. h >= 0: the first step. h < 0: only next.t0 is set, and initial_probe and initial_step choose h.
NODE_CUDA_HD inline void start_control(ControllerState& ctl, const ControllerParams& law, double direction, double t0, double h) {
  ctl = ControllerState{};
  ctl.direction = direction;
  ctl.history[0] = ctl.history[1] = 1.0;
  ctl.active = ctl.finite = 1;
  ctl.next = Interval{t0, t0, 0.0, 0.0};
  start_step_log(law.tape);
  if (h < 0.0) return;
  ctl.h = py_min(py_max(h, law.min_step), law.max_step);
  propose(ctl, law, t0);
}

// The first half of the starting step: d0 and d1 give the Euler step that probes the change of the field.
NODE_CUDA_HD inline void initial_probe(ControllerState& ctl, double d0, double d1) {
  if (!ctl.active) return;
  const double t = ctl.next.t0;
  ctl.norms[0] = d0;
  ctl.norms[1] = d1;
  if (!(is_finite(d0) && is_finite(d1))) return fail(ctl, t, NON_FINITE);
  const double h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  ctl.next = Interval{t, t + h0, h0, ctl.direction * h0};
}

// The second half: |f1 - f0| in units of the scale gives the first step, which is then proposed.
NODE_CUDA_HD inline void initial_step(ControllerState& ctl, const ControllerParams& law, double change) {
  if (!ctl.active) return;
  const double h0 = ctl.next.h, d1 = ctl.norms[1], d2 = change / h0;
  const double h1 = d1 <= 1e-15 && d2 <= 1e-15 ? py_max(1e-6, h0 * 1e-3) : pow(0.01 / py_max(d1, d2), 1.0 / law.order);
  const double h = is_finite(h1) ? py_min(100.0 * h0, h1) : h0;
  ctl.h = py_min(py_max(h, law.min_step), law.max_step);
  propose(ctl, law, ctl.next.t0);
}

// The step from the next point of a grid. next_tstop counts the points.
NODE_CUDA_HD inline void next_of_grid(ControllerState& ctl, const double* points, int64_t count) {
  const int64_t i = ctl.next_tstop++;
  if (i + 1 >= count) {
    ctl.active = 0;
    return;
  }
  const double h = points[i + 1] - points[i];
  ctl.next = Interval{points[i], points[i + 1], h, ctl.direction * h};
}

// Grid: accept the step to the current point, and move to the next step. All steps are accepted.
NODE_CUDA_HD inline void grid_control(ControllerState& ctl, const ControllerParams& law, const double* points, int64_t count) {
  ctl.first_output = ctl.next_output;
  record_nothing(law.tape);
  if (!ctl.active) {
    ctl.accept = 0;
    return;
  }
  if (ctl.next_tstop > 0) {
    ctl.last = ctl.next;
    ctl.accept = 1;
    ++ctl.accepted;
    const bool more = pass_outputs(ctl, law);
    record_step(law.tape, ctl.last, ctl.first_output, ctl.next_output, 0);
    if (!more) return;
  }
  next_of_grid(ctl, points, count);
}

// Continue a loop that pauses. points: the grid; null: the error chooses the step.
NODE_CUDA_HD inline void resume(ControllerState& ctl, const ControllerParams& law, const double* points, int64_t count) {
  if (!ctl.paused) return;
  ctl.paused = 0;
  ctl.active = 1;
  if (points == nullptr) {
    propose(ctl, law, ctl.last.t1);
  } else {
    next_of_grid(ctl, points, count);
  }
}

}  // namespace node_cuda

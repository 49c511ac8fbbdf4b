// Every launcher, for bind.cpp and the tests: plain C++ and raw pointers, without CUDA or Python types.
//
// A launcher returns a cudaError_t as int, 0 for success; failed_op() then names what failed. It restores the current
// device, does not synchronise and allocates nothing. Tensors are contiguous and have `dtype` and `n` elements unless
// stated otherwise; dtype is a Dtype, that of the state. All pointers to data point to device memory. Pointers to
// structs, and arrays of pointers and coefficients, point to host memory that is read before the launcher returns.
//
// acc: float for half and bfloat16, else the state's dtype. real: the state's real dtype.
#pragma once
#include <cstdint>

#include "control/control.h"

namespace node_cuda {

enum Dtype : int { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT16 = 3, COMPLEX_FLOAT = 4, COMPLEX_DOUBLE = 5 };

constexpr int MAX_TERMS = 20;     // nonzero coefficients in a row
constexpr int MAX_DEGREE = 8;     // of the polynomials of a dense output
constexpr int MAX_SLOTS = 32;     // times in one launch_stage_time
constexpr int MAX_COPIES = 8;     // pairs in one launch_commit
constexpr int MAX_POINTERS = 448; // tensors in one launch of accumulate; longer lists need several

// The stream and device that a kernel runs on.
struct Launch {
  void* stream;
  int32_t device;
  int32_t unused;
};

// The step: ctl->next (dense_eval: ctl->last) in device memory, or `at` if ctl is null (fixed grids, old steps). If a
// ctl is not active the kernel does nothing.
struct StepRef {
  const ControllerState* ctl;
  Interval at;
  double direction;  // used if ctl is null
};

// A 0-d tensor of the real dtype for a stage's time, in the user's time: direction * (t0 + c h), t1 for c == 1. side:
// -1: for c == 1 the number before t1, +1: for c == 0 the number after t0 (inside the step), 0: neither.
struct Slot {
  void* time;  // null: nothing is written
  double c;
  int64_t side;
};

// Numbers, or one number for each element (of the real dtype) if the pointer is not null.
struct Tolerance {
  double rtol, atol;
  const void* rtol_each;
  const void* atol_each;
};

// The segments of a flat state that have a norm each: their ends, ascending, the last one n. A count of 1 needs no
// ends.
struct Segments {
  int64_t count;
  const int64_t* ends;       // device memory
  const int64_t* host_ends;  // the same, on the host
};

// The use of the norm in the last block of a reduction.
struct Finish {
  double* result;        // gets the norm; may be null
  ControllerState* ctl;              // not null: run step_control with the largest of the norm and `also`
  const double* also;    // further norms, already computed
  int64_t also_count;
  ControllerParams law;
};

// One tensor of the list for accumulate, in device memory. dtype: of x; the sums are acc of it.
struct Part {
  void* sum;           // of this step
  void* error;         // the error of this step, null: none
  void* total;         // the sum over accepted steps; null: for accumulate alone
  int64_t size;
  int64_t first_chunk; // the sum of chunks_of(size) over the tensors before this one
  int64_t dtype;
};
static_assert(sizeof(StepRef) == 48 && sizeof(Slot) == 24 && sizeof(Tolerance) == 32, "the layout that Python writes");
static_assert(sizeof(Finish) == 184 && sizeof(Part) == 48, "the layout that Python writes");

extern "C" {

const char* failed_op();

// Bytes of workspace that reductions of this size need. It must be zeroed once, and then be used by one stream only.
int64_t reduce_workspace(int64_t n, const Segments* segments);
int64_t sums_workspace(int64_t chunks);
// Chunks of a tensor of `size` elements in a list of Parts.
int64_t chunks_of(int64_t size);

// z = y0 + dt sum_j a_j k_j over `count` nonzero coefficients (0: z = y0), and the stage's time.
int launch_rk_stage(int dtype, int64_t n, void* z, const void* y0, int count, const void* const* k, const double* a,
                    const StepRef* where, const Slot* slot, Launch on);
// y1 = y0 + dt sum_j b_j k_j and error = dt sum_j e_j k_j (acc; null: none); k are those with nonzero b_j or e_j.
int launch_rk_finish(int dtype, int64_t n, void* y1, void* error, const void* y0, int count, const void* const* k,
                     const double* b, const double* e, const StepRef* where, const Slot* slot, Launch on);
// Only the times of stages.
int launch_stage_time(int dtype, int count, const Slot* slots, const StepRef* where, Launch on);
// max over segments of rms |error + dt e_last k_last| / (atol + rtol max(|y0|, |y1|)); last may be null.
int launch_error_ratio(int dtype, int64_t n, const void* error, const void* last, double e_last, const void* y0,
                       const void* y1, const Tolerance* tolerance, const Segments* segments, void* workspace,
                       const StepRef* where, const Finish* finish, Launch on);
// The same quotient for each element, of acc, for a norm of the user. out may be error.
int launch_scaled_error(int dtype, int64_t n, void* out, const void* error, const void* last, double e_last,
                        const void* y0, const void* y1, const Tolerance* tolerance, const StepRef* where, Launch on);
// step_control with the largest of `count` ratios in device memory.
int launch_step_control(ControllerState* ctl, const ControllerParams* law, const double* ratios, int64_t count, Launch on);
// start_control: the only launcher that makes a ControllerState. t0: in device memory, null: use t0_otherwise.
int launch_start_control(ControllerState* ctl, const ControllerParams* law, double direction, const double* t0, double t0_otherwise, double h,
                         Launch on);
int launch_grid_control(ControllerState* ctl, const ControllerParams* law, const double* points, int64_t count, Launch on);
// Continues a loop that pauses at an output; points null: by the error.
int launch_resume(ControllerState* ctl, const ControllerParams* law, const double* points, int64_t count, Launch on);
// Starts the reverse pass over a tape, after its last step. ctl belongs to the reverse pass. It is active if there is a
// step to reverse. If the tape does not have all steps, it is not active and its status is RECORD_FULL.
int launch_begin_reverse(ControllerState* ctl, StepLog* tape, Launch on);
// Loads the step before the one that was reversed last: it becomes the current step of the reverse pass's ctl, as if
// just judged; tape->row is its number. time: a 0-d tensor of the real dtype for the time of its first stage (null:
// nothing is written). Does nothing if ctl is not active.
int launch_load_step(int dtype, ControllerState* ctl, StepLog* tape, void* time, Launch on);
// Advances the reverse pass: ctl stays active while there are steps before the one that was reversed last.
int launch_advance_reverse(ControllerState* ctl, const StepLog* tape, Launch on);
// The only call that waits: copies ctl, after all earlier launches of the stream, into (pinned) host memory.
int read_control(ControllerState* host, const ControllerState* ctl, Launch on);
// d0 = |y0 / scale|, d1 = |f0 / scale|, scale = atol + rtol |y0|, written to norms[0..1] (may be null). Then
// initial_probe of ctl (may be null), which sets the step for rk_stage([f0], {1}, c = 1, side = 0).
int launch_initial_norms(int dtype, int64_t n, const void* y0, const void* f0, const Tolerance* tolerance,
                         const Segments* segments, void* workspace, double* norms, ControllerState* ctl, Launch on);
// |(f1 - f0) / scale|, written to norms[0] (may be null). Then initial_step of ctl (may be null).
int launch_initial_change(int dtype, int64_t n, const void* y0, const void* f0, const void* f1,
                          const Tolerance* tolerance, const Segments* segments, void* workspace, double* norms,
                          ControllerState* ctl, const ControllerParams* law, Launch on);
// out[i] = y0 + P(x_i) (y1 - y0) + dt sum_j B_j(x_i) k_j, x_i = (times[i] - t0) / (t1 - t0), y1 itself for times[i] ==
// t1. B_j(x) = sum_d weights[j * degree + d] x^(d + 1); P in the same way from end_weights (null: P = 0). Outputs
// [first, stop) of the rows of n elements at `out`; with a ctl the outputs in its accepted step instead.
int launch_dense_eval(int dtype, int64_t n, void* out, const double* times, int64_t first, int64_t stop,
                      const void* y0, const void* y1, int count, int degree, const void* const* k,
                      const double* weights, const double* end_weights, const StepRef* where, Launch on);
// The transpose: from the outputs' gradients g_i, the cotangents of y1, of y0 and of the k_j with the factors dt B_j.
// lam is the cotangent of y1 from other sources. lam_out = lam + sum g_i + sum P(x_i) g_i, start = sum (1 - P(x_i))
// g_i, and extra[j] = dt sum B_j(x_i) g_i, where the first sum is over the outputs with times[i] == t1 and the others
// are over those before. All are written, also without outputs; lam_out may be lam. Outputs [first, stop) of the rows
// of n elements at `gradients`; with a ctl the outputs in its current step instead. Not for half precision.
int launch_dense_adjoint(int dtype, int64_t n, void* lam_out, void* start, void* const* extra, const void* lam,
                         const void* gradients, const double* times, int64_t first, int64_t stop, int count,
                         int degree, const double* weights, const double* end_weights, const StepRef* where, Launch on);
// to[i] = from[i] for `bytes` bytes each, if ctl's last step was accepted.
int launch_commit(int64_t bytes, int count, void* const* to, const void* const* from, const ControllerState* ctl, Launch on);
// row = [f, -vjp], of 2 n elements; vjp null: zeros.
int launch_pack_adjoint(int dtype, int64_t n, void* row, const void* f, const void* vjp, Launch on);
// sum_i (+)= weight dt x_i and error_i (+)= error_weight dt x_i over a list. add 0: =, 1: +=. x: host array of device
// pointers; null tensors count as zeros. With `when_accepted` and a ctl: only if its last step was accepted, with dt 1.
int launch_accumulate(const Part* parts, int64_t count, int64_t chunks, const int64_t* host_first_chunks,
                      const void* const* x, double weight, double error_weight, int add, int when_accepted,
                      const StepRef* where, Launch on);
// total_i += sum_i over the list, if ctl's last step was accepted (null: always).
int launch_commit_sums(const Part* parts, int64_t count, int64_t chunks, const ControllerState* ctl, Launch on);
// max over the list of rms error_i / (atol + rtol max(|total_i|, |total_i + sum_i|)).
int launch_sums_ratio(const Part* parts, int64_t count, int64_t chunks, double rtol, double atol, void* workspace,
                      const ControllerState* ctl, const Finish* finish, Launch on);
// dot = Re sum conj(g) f, and a += g (a null: only the dot; f and dot null: only the sum).
int launch_jump(int dtype, int64_t n, void* a, const void* g, const void* f, double* dot, void* workspace, Launch on);

}  // extern "C"
}  // namespace node_cuda

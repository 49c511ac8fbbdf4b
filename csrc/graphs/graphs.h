// Loops over the captured graph of one attempted step, without a decision of the host in each step. WhileGraph repeats
// the step on the GPU in one launch. replay and Flag repeat it from the host, which checks the end of one batch while
// the next one runs.
//
// Uses neither Python nor torch. Throws Impossible if this step, driver or build does not support a loop on the GPU
// (the host can still repeat the steps), and std::runtime_error for an error of CUDA.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "control/control.h"

namespace node_cuda {

class Impossible : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// while (ctl->active) step, as one launch.
//
//     set_condition -> while { step -> set_condition }
//
// The loop holds a copy of the step. The graph of the step may be destroyed afterwards, but the memory that its nodes
// use must stay.
class WhileGraph {
 public:
  WhileGraph(cudaGraph_t step, const ControllerState* ctl, int32_t device);
  ~WhileGraph();
  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  void launch(cudaStream_t stream) const;

 private:
  // Runs first, so that the destructor frees everything if the other constructor throws.
  explicit WhileGraph(int32_t device) : device_(device) {}

  int32_t device_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// Launches the same graph `times` times.
void replay(cudaGraphExec_t exec, int64_t times, cudaStream_t stream, int32_t device);

// A copy of ctl in host memory, as it is when the stream reaches the last `record`. With two of them the next batch is
// already in the stream while the host waits for one batch of steps.
class Flag {
 public:
  Flag(const ControllerState* ctl, int32_t device);
  ~Flag();  // waits for a copy that is still running
  Flag(const Flag&) = delete;
  Flag& operator=(const Flag&) = delete;

  void record(cudaStream_t stream);
  void wait();
  const ControllerState& read() const;  // after `wait`

 private:
  enum State { NEVER, ON_ITS_WAY, THERE };

  explicit Flag(int32_t device) : device_(device) {}

  int32_t device_;
  const ControllerState* ctl_ = nullptr;
  ControllerState* host_ = nullptr;
  cudaEvent_t event_ = nullptr;
  State state_ = NEVER;
};

}  // namespace node_cuda

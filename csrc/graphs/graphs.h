// A solve without the host in its loop, from the captured graph of one attempted step: WhileGraph repeats it on the GPU
// in one launch; replay and Flag repeat it from the host, which looks at the end of one batch while the next one runs.
//
// Neither Python nor torch. What fails throws: Impossible where this step, driver or build cannot have a loop on the
// GPU at all (another way of solving can), std::runtime_error for an error of CUDA's.
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
// The loop holds a copy of the step: its graph may be destroyed afterwards, but not the memory that its nodes work on.
class WhileGraph {
 public:
  WhileGraph(cudaGraph_t step, const ControllerState* ctl, int32_t device);
  ~WhileGraph();
  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  void launch(cudaStream_t stream) const;

 private:
  explicit WhileGraph(int32_t device) : device_(device) {}  // owns, so that what follows may throw

  int32_t device_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// The same launch `times` times.
void replay(cudaGraphExec_t exec, int64_t times, cudaStream_t stream, int32_t device);

// A copy of ctl in host memory, as it is where the stream has come to the last `record`. With two of them a host that
// waits for one batch of steps has the next one in the stream already.
class Flag {
 public:
  Flag(const ControllerState* ctl, int32_t device);
  ~Flag();  // waits for a copy that is on its way
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

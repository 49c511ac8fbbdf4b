#ifdef NODE_CUDA_WITH_KERNELS
#include "graphs/graphs.h"

#include <map>
#include <string>
#include <vector>

#include "common/device_guard.h"
#include "graphs/set_condition.h"

namespace node_cuda {
namespace {

constexpr int DRIVER_WITH_WHILE = 12040;

// While it exists this thread may free memory during a capture. Python frees objects at any time, and torch's
// destructors do the same; without this the capture of any thread would fail.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // afterwards: the previous mode
};

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

#if NODE_CUDA_HAS_WHILE
struct Words {
  const char* one;
  const char* many;
};

bool allowed(int type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeEmpty:
    case cudaGraphNodeTypeGraph: return true;
    default: return false;
  }
}

Words words_for(int type) {
  switch (type) {
    case cudaGraphNodeTypeHost: return {"call of a host function", "calls of host functions"};
    case cudaGraphNodeTypeWaitEvent: return {"wait for an event", "waits for events"};
    case cudaGraphNodeTypeEventRecord: return {"record of an event", "records of events"};
    case cudaGraphNodeTypeExtSemaphoreSignal: return {"signal to a semaphore", "signals to semaphores"};
    case cudaGraphNodeTypeExtSemaphoreWait: return {"wait for a semaphore", "waits for semaphores"};
    case cudaGraphNodeTypeMemAlloc: return {"allocation of memory", "allocations of memory"};
    case cudaGraphNodeTypeMemFree: return {"release of memory", "releases of memory"};
    case cudaGraphNodeTypeConditional: return {"branch or loop", "branches or loops"};
    default: return {"node of an unknown kind", "nodes of an unknown kind"};
  }
}

// Counts, by type, the nodes that a child graph in a loop must not contain, in the graph and in its child graphs.
void count_refused(cudaGraph_t graph, std::map<int, int>* counts) {
  size_t size = 0;
  EXPECT(cudaGraphGetNodes, graph, nullptr, &size);
  std::vector<cudaGraphNode_t> nodes(size);
  if (size > 0) EXPECT(cudaGraphGetNodes, graph, nodes.data(), &size);
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    EXPECT(cudaGraphNodeGetType, node, &type);
    if (!allowed(type)) ++(*counts)[type];
    if (type != cudaGraphNodeTypeGraph) continue;
    cudaGraph_t child;
    EXPECT(cudaGraphChildGraphNodeGetGraph, node, &child);
    count_refused(child, counts);
  }
}

void refuse_what_no_loop_may_hold(cudaGraph_t step) {
  std::map<int, int> counts;
  count_refused(step, &counts);
  if (counts.empty()) return;
  std::string found;
  for (const auto& [type, count] : counts) {
    const Words words = words_for(type);
    found += (found.empty() ? "" : ", ") + std::to_string(count) + " " + (count == 1 ? words.one : words.many);
  }
  throw Impossible("a loop on the GPU may hold kernels, copies and memsets only, and the captured step has " + found);
}

void refuse_old_driver() {
  int driver = 0;
  EXPECT(cudaDriverGetVersion, &driver);
  if (driver < DRIVER_WITH_WHILE)
    throw Impossible("a loop on the GPU needs a driver for CUDA " + version(DRIVER_WITH_WHILE) + " or newer, and " +
                     (driver == 0 ? "there is none" : "this one is for " + version(driver)));
}

void add_loop(cudaGraph_t graph, cudaGraph_t step, const ControllerState* ctl) {
  cudaGraphConditionalHandle goes_on;
  EXPECT(cudaGraphConditionalHandleCreate, &goes_on, graph, 0, cudaGraphCondAssignDefault);
  cudaGraphNode_t before, loop, once, after;
  expect(add_set_condition(&before, graph, nullptr, 0, goes_on, ctl), "cudaGraphAddKernelNode");
  cudaGraphNodeParams condition{};
  condition.type = cudaGraphNodeTypeConditional;
  condition.conditional.handle = goes_on;
  condition.conditional.type = cudaGraphCondTypeWhile;
  condition.conditional.size = 1;
#if CUDART_VERSION >= 13000
  EXPECT(cudaGraphAddNode, &loop, graph, &before, nullptr, 1, &condition);
#else
  EXPECT(cudaGraphAddNode, &loop, graph, &before, 1, &condition);
#endif
  const cudaGraph_t body = condition.conditional.phGraph_out[0];
  EXPECT(cudaGraphAddChildGraphNode, &once, body, nullptr, 0, step);
  expect(add_set_condition(&after, body, &once, 1, goes_on, ctl), "cudaGraphAddKernelNode");
}
#endif

}  // namespace

WhileGraph::~WhileGraph() {
  const DeviceGuard guard(device_);
  const Relaxed relaxed;
  // A launch that is still running keeps the resources that it needs.
  if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
  if (graph_ != nullptr) cudaGraphDestroy(graph_);
}

#if NODE_CUDA_HAS_WHILE
WhileGraph::WhileGraph(cudaGraph_t step, const ControllerState* ctl, int32_t device) : WhileGraph(device) {
  refuse_old_driver();
  const DeviceGuard guard(device);
  expect(guard.error(), "cudaSetDevice");
  refuse_what_no_loop_may_hold(step);
  EXPECT(cudaGraphCreate, &graph_, 0);
  add_loop(graph_, step, ctl);
  EXPECT(cudaGraphInstantiate, &exec_, graph_, 0);
}

void WhileGraph::launch(cudaStream_t stream) const {
  const DeviceGuard guard(device_);
  expect(guard.error(), "cudaSetDevice");
  EXPECT(cudaGraphLaunch, exec_, stream);
}
#else
WhileGraph::WhileGraph(cudaGraph_t, const ControllerState*, int32_t device) : WhileGraph(device) {
  throw Impossible("a loop on the GPU needs node_cuda to be compiled with CUDA " + version(DRIVER_WITH_WHILE) +
                   " or newer, and it was with " + version(CUDART_VERSION));
}

void WhileGraph::launch(cudaStream_t) const {}  // without CUDA there is no loop to launch
#endif

void replay(cudaGraphExec_t exec, int64_t times, cudaStream_t stream, int32_t device) {
  const DeviceGuard guard(device);
  expect(guard.error(), "cudaSetDevice");
  for (int64_t i = 0; i < times; ++i) EXPECT(cudaGraphLaunch, exec, stream);
}

Flag::Flag(const ControllerState* ctl, int32_t device) : Flag(device) {
  const DeviceGuard guard(device);
  expect(guard.error(), "cudaSetDevice");
  ctl_ = ctl;
  EXPECT(cudaHostAlloc, reinterpret_cast<void**>(&host_), sizeof(ControllerState), cudaHostAllocDefault);
  EXPECT(cudaEventCreateWithFlags, &event_, cudaEventDisableTiming);
}

Flag::~Flag() {
  const DeviceGuard guard(device_);
  const Relaxed relaxed;
  if (state_ == ON_ITS_WAY) cudaEventSynchronize(event_);
  if (event_ != nullptr) cudaEventDestroy(event_);
  if (host_ != nullptr) cudaFreeHost(host_);
}

void Flag::record(cudaStream_t stream) {
  const DeviceGuard guard(device_);
  expect(guard.error(), "cudaSetDevice");
  EXPECT(cudaMemcpyAsync, host_, ctl_, sizeof(ControllerState), cudaMemcpyDeviceToHost, stream);
  EXPECT(cudaEventRecord, event_, stream);
  state_ = ON_ITS_WAY;
}

void Flag::wait() {
  if (state_ != ON_ITS_WAY) return;
  const DeviceGuard guard(device_);
  expect(guard.error(), "cudaSetDevice");
  EXPECT(cudaEventSynchronize, event_);
  state_ = THERE;
}

const ControllerState& Flag::read() const {
  if (state_ == NEVER) throw std::logic_error("node_cuda: a flag is read before it was recorded");
  if (state_ == ON_ITS_WAY) throw std::logic_error("node_cuda: a flag is read before its copy is there: wait() first");
  return *host_;
}

}  // namespace node_cuda
#endif

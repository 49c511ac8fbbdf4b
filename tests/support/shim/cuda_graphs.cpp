#include "cuda_graphs.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#include "cuda_shim.h"

using shim::complain;

struct CUgraphNode_st {
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
  CUgraph_st* graph = nullptr;
  std::vector<CUgraphNode_st*> after;
  std::function<void()> run;            // kernels, copies, memsets
  std::unique_ptr<CUgraph_st> within;   // the child graph, or the body of a loop
  CUgraph_st* body = nullptr;           // what phGraph_out points to
  cudaGraphConditionalHandle condition = 0;
};

struct CUgraph_st {
  CUgraph_st* parent = nullptr;
  bool instantiated = false;
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;

  CUgraph_st();
  ~CUgraph_st();
};

struct Condition {
  CUgraph_st* graph;
  unsigned default_value, flags;
  bool used;
  int64_t value = -1;  // of an executable graph; -1: no call has set it
};

struct CUgraphExec_st {
  std::unique_ptr<CUgraph_st> graph;
  CUgraph_st* of = nullptr;
  std::map<cudaGraphConditionalHandle, Condition> conditions;
};

struct Capture {
  CUgraph_st* graph;
  CUgraphNode_st* last = nullptr;  // the node that the next node depends on
  bool invalid = false;
};

struct CUevent_st {
  std::shared_ptr<int64_t> done = std::make_shared<int64_t>(0);
  int64_t recorded = 0;
  cudaStream_t stream = nullptr;
};

namespace {

struct Stream {
  std::deque<shim::Work> queue;
  std::unique_ptr<Capture> capture;
};

// All objects that exist. A handle that is not in these sets is not dereferenced.
std::set<CUgraph_st*> graphs;
std::set<CUgraph_st*> owned_graphs;  // by the user: created or captured
std::set<CUgraphNode_st*> nodes;
std::map<cudaGraphConditionalHandle, Condition> conditions;
std::map<CUgraphExec_st*, std::shared_ptr<CUgraphExec_st>> execs;
std::set<CUevent_st*> events;
std::map<void*, size_t> host_memory;
std::map<cudaStream_t, Stream> streams;
std::mutex streams_mutex;
std::map<void*, shim::Binder> functions;
CUgraphExec_st* running = nullptr;
cudaGraphConditionalHandle next_condition = 1;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

// Solves on several host threads look up their streams at the same time: a call that waits does not hold the GIL.
Stream& stream_of(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(streams_mutex);
  return streams[stream];
}

// Records a call; a result other than cudaSuccess makes it fail.
cudaError_t call(const char* name) {
  if (shim::holds_gil != nullptr)
    shim::calls += std::string(name) + " " + std::to_string(shim::device) + " " + std::to_string(shim::holds_gil()) + "\n";
  if (shim::failing_call != name || shim::failing_after-- > 0) return cudaSuccess;
  shim::failing_call.clear();
  return shim::failing_error;
}
#define CALL(name) \
  if (const cudaError_t failure = call(#name); failure != cudaSuccess) return failed(failure)
#define NEED(condition, error) \
  if (!(condition)) return failed(error)

cudaError_t failed(cudaError_t error) {
  shim::next_error = error;  // until the next cudaGetLastError
  return error;
}

// A call that is not part of this stream's capture, and that the capture does not allow.
cudaError_t spoil(Stream& s) {
  if (s.capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
  s.capture->invalid = true;
  return failed(cudaErrorStreamCaptureUnsupported);
}

// A call that no thread may make during a capture of the default mode, unless the thread's own mode is relaxed.
cudaError_t unseen_by_captures() {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(streams_mutex);
  for (auto& [_, stream] : streams)
    if (stream.capture != nullptr) return spoil(stream);
  return cudaSuccess;
}
#define NO_CAPTURE() \
  if (const cudaError_t refused = unseen_by_captures(); refused != cudaSuccess) return refused

bool holds(CUgraph_st* graph, const std::set<cudaGraphNodeType>& types) {
  return std::any_of(graph->nodes.begin(), graph->nodes.end(), [&](const auto& node) {
    return types.count(node->type) > 0 || (node->within != nullptr && holds(node->within.get(), types));
  });
}

std::unique_ptr<CUgraph_st> clone(const CUgraph_st* graph, CUgraph_st* parent) {
  auto copy = std::make_unique<CUgraph_st>();
  copy->parent = parent;
  std::map<const CUgraphNode_st*, CUgraphNode_st*> twin;
  for (const auto& node : graph->nodes) {
    auto other = std::make_unique<CUgraphNode_st>();
    other->type = node->type, other->graph = copy.get(), other->run = node->run, other->condition = node->condition;
    for (const CUgraphNode_st* before : node->after) other->after.push_back(twin.at(before));
    if (node->within != nullptr) other->within = clone(node->within.get(), copy.get());
    nodes.insert(other.get());
    twin[node.get()] = other.get();
    copy->nodes.push_back(std::move(other));
  }
  return copy;
}

// Runs a node that is ready, chosen by a seed, until no node is left.
void run(const CUgraph_st& graph, CUgraphExec_st& exec, std::mt19937_64& random) {
  std::set<const CUgraphNode_st*> done;
  while (done.size() < graph.nodes.size()) {
    std::vector<const CUgraphNode_st*> ready;
    for (const auto& node : graph.nodes)
      if (done.count(node.get()) == 0 &&
          std::all_of(node->after.begin(), node->after.end(), [&](auto* before) { return done.count(before) > 0; }))
        ready.push_back(node.get());
    const CUgraphNode_st* const node = ready[shim::seed == 0 ? ready.size() - 1 : random() % ready.size()];
    if (node->run) node->run();
    if (node->type == cudaGraphNodeTypeGraph) run(*node->within, exec, random);
    if (node->type == cudaGraphNodeTypeConditional) {
      const int64_t& goes_on = exec.conditions.at(node->condition).value;
      for (int64_t rounds = 0; goes_on != 0; ++rounds) {
        if (goes_on < 0) {
          complain("a loop begins before its condition was set");
          break;
        }
        if (rounds == shim::most_rounds) {
          complain("a loop has no end");
          break;
        }
        run(*node->within, exec, random);
      }
    }
    done.insert(node);
  }
}

cudaError_t add(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                std::unique_ptr<CUgraphNode_st> node) {
  for (size_t i = 0; i < count; ++i) {
    NEED(nodes.count(after[i]) && after[i]->graph == graph, cudaErrorInvalidValue);
    node->after.push_back(after[i]);
  }
  node->graph = graph;
  nodes.insert(node.get());
  *out = node.get();
  graph->nodes.push_back(std::move(node));
  return cudaSuccess;
}

std::unique_ptr<CUgraphNode_st> node_of(cudaGraphNodeType type) {
  auto node = std::make_unique<CUgraphNode_st>();
  node->type = type;
  return node;
}

// The next node of a stream's capture.
cudaError_t capture(Stream& s, std::unique_ptr<CUgraphNode_st> node) {
  NEED(!s.capture->invalid, cudaErrorStreamCaptureInvalidated);
  CUgraphNode_st* added = nullptr;
  const cudaError_t error =
      add(&added, s.capture->graph, &s.capture->last, s.capture->last != nullptr ? 1 : 0, std::move(node));
  s.capture->last = added;
  return error;
}

}  // namespace

CUgraph_st::CUgraph_st() { graphs.insert(this); }
CUgraph_st::~CUgraph_st() {
  graphs.erase(this);
  for (const auto& node : nodes) ::nodes.erase(node.get());
  for (auto each = conditions.begin(); each != conditions.end();)
    each = each->second.graph == this ? conditions.erase(each) : std::next(each);
}

namespace shim {

void complain(const std::string& what) { complaints += what + "\n"; }

int leaks() {
  size_t queued = 0;
  for (const auto& [_, stream] : streams) queued += stream.queue.size() + (stream.capture != nullptr);
  return static_cast<int>(owned_graphs.size() + execs.size() + events.size() + host_memory.size() + queued);
}

void* know_function(void* function, Binder binder) {
  functions[function] = binder;
  return function;
}

cudaError_t submit(cudaStream_t stream, Work work) {
  Stream& s = stream_of(stream);
  if (s.capture != nullptr) {
    auto node = node_of(work.type);
    node->run = std::move(work.run);
    return capture(s, std::move(node));
  }
  if (lazy) {
    s.queue.push_back(std::move(work));
  } else {
    work.run();
  }
  return cudaSuccess;
}

bool progress(cudaStream_t stream) {
  Stream& s = stream_of(stream);
  if (s.queue.empty()) return false;
  const Work work = std::move(s.queue.front());
  s.queue.pop_front();
  work.run();
  return true;
}

cudaGraphNode_t add_bare_node(cudaGraph_t graph, cudaGraphNodeType type, cudaGraphNode_t after) {
  cudaGraphNode_t node = nullptr;
  if (graphs.count(graph)) add(&node, graph, &after, after == nullptr ? 0 : 1, node_of(type));
  return node;
}

}  // namespace shim

// --- streams, events, memory -----------------------------------------------------------------------------------------

cudaError_t cudaDriverGetVersion(int* version) {
  CALL(cudaDriverGetVersion);
  *version = shim::driver_version;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  CALL(cudaMemcpyAsync);
  return shim::submit(stream, {cudaGraphNodeTypeMemcpy, [=] { std::memcpy(to, from, bytes); }, to});
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  CALL(cudaMemsetAsync);
  return shim::submit(stream, {cudaGraphNodeTypeMemset, [=] { std::memset(to, value, bytes); }, nullptr});
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CALL(cudaStreamSynchronize);
  if (Stream& s = stream_of(stream); s.capture != nullptr) return spoil(s);
  while (shim::progress(stream)) {
  }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  CALL(cudaHostAlloc);
  NO_CAPTURE();
  *memory = std::malloc(bytes);
  host_memory[*memory] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  CALL(cudaFreeHost);
  NO_CAPTURE();
  NEED(host_memory.erase(memory) == 1, cudaErrorInvalidValue);
  for (const auto& [_, stream] : streams)
    for (const shim::Work& work : stream.queue)
      if (work.writes == memory) complain("host memory is freed during a copy to it");
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CALL(cudaEventCreateWithFlags);
  *event = new CUevent_st;
  events.insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CALL(cudaEventRecord);
  NEED(events.count(event), cudaErrorInvalidResourceHandle);
  Stream& s = stream_of(stream);
  if (s.capture != nullptr) return spoil(s);  // not supported by this shim
  event->stream = stream;
  return shim::submit(stream, {cudaGraphNodeTypeEventRecord,
                               [done = event->done, number = ++event->recorded] { *done = number; }, nullptr});
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CALL(cudaEventSynchronize);
  NEED(events.count(event), cudaErrorInvalidResourceHandle);
  NO_CAPTURE();
  while (*event->done != event->recorded)
    if (!shim::progress(event->stream)) {
      complain("a wait for an event that will never happen");
      break;
    }
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  CALL(cudaEventDestroy);
  if (events.erase(event) == 0) complain("an event is destroyed that does not exist");
  else delete event;
  return cudaSuccess;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  CALL(cudaStreamBeginCapture);
  Stream& s = stream_of(stream);
  NEED(s.capture == nullptr, cudaErrorIllegalState);
  s.capture = std::make_unique<Capture>(Capture{new CUgraph_st});
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  CALL(cudaStreamEndCapture);
  *graph = nullptr;
  const std::unique_ptr<Capture> capture = std::move(stream_of(stream).capture);
  NEED(capture != nullptr, cudaErrorIllegalState);
  if (capture->invalid) {
    delete capture->graph;
    return failed(cudaErrorStreamCaptureInvalidated);
  }
  *graph = capture->graph;
  owned_graphs.insert(capture->graph);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  CALL(cudaGraphCreate);
  NEED(flags == 0, cudaErrorInvalidValue);
  *graph = new CUgraph_st;
  owned_graphs.insert(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  CALL(cudaGraphDestroy);
  if (owned_graphs.erase(graph) == 0) {
    complain("a graph is destroyed that does not exist or that the caller does not own");
    return failed(cudaErrorInvalidValue);
  }
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* out, size_t* count) {
  CALL(cudaGraphGetNodes);
  NEED(graphs.count(graph), cudaErrorInvalidValue);
  if (out != nullptr)
    for (size_t i = 0; i < std::min(*count, graph->nodes.size()); ++i) out[i] = graph->nodes[i].get();
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  CALL(cudaGraphNodeGetType);
  NEED(nodes.count(node), cudaErrorInvalidValue);
  *type = node->type;
  return cudaSuccess;
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  CALL(cudaGraphChildGraphNodeGetGraph);
  NEED(nodes.count(node) && node->type == cudaGraphNodeTypeGraph, cudaErrorInvalidValue);
  *graph = node->within.get();
  return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value, unsigned flags) {
  CALL(cudaGraphConditionalHandleCreate);
  NEED(graphs.count(graph) && flags <= cudaGraphCondAssignDefault, cudaErrorInvalidValue);
  *handle = next_condition++;
  conditions[*handle] = Condition{graph, default_value, flags, false};
  return cudaSuccess;
}

cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
                                   size_t count, const cudaKernelNodeParams* p) {
  CALL(cudaGraphAddKernelNode);
  NEED(graphs.count(graph) && p->gridDim.x > 0 && p->blockDim.x > 0, cudaErrorInvalidValue);
  NEED(functions.count(p->func), cudaErrorInvalidDeviceFunction);
  auto node = node_of(cudaGraphNodeTypeKernel);
  node->run = functions[p->func](p->func, p->kernelParams, p->gridDim.x, p->blockDim.x);
  return add(out, graph, after, count, std::move(node));
}

cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       size_t count, cudaGraph_t child) {
  CALL(cudaGraphAddChildGraphNode);
  NEED(graphs.count(graph) && graphs.count(child), cudaErrorInvalidValue);
  NEED(!holds(child, {cudaGraphNodeTypeConditional, cudaGraphNodeTypeMemAlloc, cudaGraphNodeTypeMemFree}),
       cudaErrorNotSupported);
  auto node = node_of(cudaGraphNodeTypeGraph);
  node->within = clone(child, graph);
  return add(out, graph, after, count, std::move(node));
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
#if CUDART_VERSION >= 13000
                             const cudaGraphEdgeData*,
#endif
                             size_t count, cudaGraphNodeParams* p) {
  CALL(cudaGraphAddNode);
  // the only type that this shim supports
  NEED(graphs.count(graph) && p->type == cudaGraphNodeTypeConditional, cudaErrorInvalidValue);
  NEED(p->reserved0[0] == 0 && p->reserved0[1] == 0 && p->reserved0[2] == 0 && p->reserved2 == 0,
       cudaErrorInvalidValue);
  cudaConditionalNodeParams& wanted = p->conditional;
  const auto condition = conditions.find(wanted.handle);
  NEED(condition != conditions.end() && condition->second.graph == graph && !condition->second.used,
       cudaErrorInvalidValue);
  NEED(wanted.type == cudaGraphCondTypeWhile && wanted.size == 1, cudaErrorInvalidValue);
  auto node = node_of(cudaGraphNodeTypeConditional);
  node->condition = wanted.handle;
  node->within = std::make_unique<CUgraph_st>();
  node->within->parent = graph;
  node->body = node->within.get();
  wanted.phGraph_out = &node->body;
  condition->second.used = true;
  return add(out, graph, after, count, std::move(node));
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  CALL(cudaGraphInstantiate);
  NEED(owned_graphs.count(graph) && flags == 0, cudaErrorInvalidValue);
  const bool loops = holds(graph, {cudaGraphNodeTypeConditional});
  NEED(!loops || !graph->instantiated, cudaErrorNotSupported);  // one instance at a time
  for (const auto& node : graph->nodes)
    if (node->type == cudaGraphNodeTypeConditional)
      NEED(!holds(node->within.get(),
                  {cudaGraphNodeTypeHost, cudaGraphNodeTypeWaitEvent, cudaGraphNodeTypeEventRecord,
                   cudaGraphNodeTypeExtSemaphoreSignal, cudaGraphNodeTypeExtSemaphoreWait, cudaGraphNodeTypeMemAlloc,
                   cudaGraphNodeTypeMemFree}),
           cudaErrorNotSupported);
  auto exec = std::make_shared<CUgraphExec_st>();
  for (const auto& [handle, condition] : conditions) {
    if (condition.graph != graph) continue;
    NEED(condition.used, cudaErrorInvalidValue);
    exec->conditions[handle] = condition;
  }
  exec->graph = clone(graph, nullptr);
  exec->of = graph;
  graph->instantiated = true;
  *out = exec.get();
  execs[exec.get()] = std::move(exec);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  CALL(cudaGraphLaunch);
  NEED(execs.count(exec), cudaErrorInvalidValue);
  if (Stream& s = stream_of(stream); s.capture != nullptr) {
    // the condition would be in a child graph
    if (holds(exec->graph.get(), {cudaGraphNodeTypeConditional})) return spoil(s);
    auto node = node_of(cudaGraphNodeTypeGraph);
    node->within = clone(exec->graph.get(), s.capture->graph);
    return capture(s, std::move(node));
  }
  const auto launched = [exec = execs[exec]] {
    for (auto& [_, condition] : exec->conditions)
      if (condition.flags == cudaGraphCondAssignDefault) condition.value = condition.default_value;
    std::mt19937_64 random(shim::seed);
    running = exec.get();
    run(*exec->graph, *exec, random);
    running = nullptr;
  };
  return shim::submit(stream, {cudaGraphNodeTypeGraph, launched, nullptr});
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  CALL(cudaGraphExecDestroy);
  NO_CAPTURE();
  const auto found = execs.find(exec);
  if (found == execs.end()) {
    complain("an executable graph is destroyed that does not exist");
    return failed(cudaErrorInvalidValue);
  }
  if (graphs.count(exec->of)) exec->of->instantiated = false;
  execs.erase(found);  // a launch that has not run yet keeps it
  return cudaSuccess;
}

void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  if (running == nullptr || running->conditions.count(handle) == 0)
    return complain("the condition of another graph is set");
  running->conditions[handle].value = value;
}

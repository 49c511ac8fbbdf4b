// That the shim's runtime refuses what CUDA refuses, and complains about what CUDA leaves undefined. Prints what is wrong.
#include <cstdio>

#include "cuda_shim.h"

namespace {

int wrong = 0;
void expect(bool holds, const char* what) {
  cudaGetLastError();
  if (holds) return;
  std::printf("%s\n", what);
  ++wrong;
}
void expect_complaint(const char* what) {
  expect(shim::complaints.find(what) != std::string::npos, what);
  shim::complaints.clear();
}

void set_kernel(cudaGraphConditionalHandle condition, unsigned value) { cudaGraphSetConditional(condition, value); }
void count_kernel(int* count) { ++*count; }

template <class... A>
cudaError_t kernel_node(cudaGraphNode_t* node, cudaGraph_t graph, std::vector<cudaGraphNode_t> after, void* function,
                        A... arguments) {
  void* addresses[] = {&arguments...};
  const cudaKernelNodeParams parameters{function, dim3(1), dim3(1), 0, addresses, nullptr};
  return cudaGraphAddKernelNode(node, graph, after.data(), after.size(), &parameters);
}

cudaError_t loop_node(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphConditionalHandle condition,
                      cudaGraph_t* body = nullptr, unsigned size = 1) {
  cudaGraphNodeParams parameters{};
  parameters.type = cudaGraphNodeTypeConditional;
  parameters.conditional.handle = condition;
  parameters.conditional.type = cudaGraphCondTypeWhile;
  parameters.conditional.size = size;
  const cudaError_t error = cudaGraphAddNode(node, graph, nullptr, nullptr, 0, &parameters);
  if (body != nullptr && error == cudaSuccess) *body = parameters.conditional.phGraph_out[0];
  return error;
}

void launch_once(cudaGraph_t graph) {
  cudaGraphExec_t exec = nullptr;
  expect(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess, "a graph that is in order");
  cudaGraphLaunch(exec, nullptr);
  cudaGraphExecDestroy(exec);
}

}  // namespace

int main() {
  void* const set = shim::function(set_kernel);
  void* const count = shim::function(count_kernel);
  cudaGraph_t one = nullptr, other = nullptr, body = nullptr;
  cudaGraphNode_t node = nullptr, second = nullptr, loop = nullptr;
  cudaGraphConditionalHandle condition = 0;
  cudaGraphExec_t exec = nullptr;
  int counted = 0;
  cudaGraphCreate(&one, 0);
  cudaGraphCreate(&other, 0);

  // Nodes.
  expect(kernel_node(&node, one, {}, reinterpret_cast<void*>(&counted), &counted) != 0, "no kernel");
  expect(kernel_node(&node, one, {}, count, &counted) == 0, "a kernel");
  expect(kernel_node(&second, other, {node}, count, &counted) != 0, "behind a node of another graph");
  expect(cudaGraphAddChildGraphNode(&second, one, &node, 1, other) == 0, "a child");
  expect(cudaGraphDestroy(nullptr) != 0, "a graph that is none");
  expect_complaint("destroyed that is none");
  cudaGraph_t child = nullptr;
  expect(cudaGraphChildGraphNodeGetGraph(node, &child) != 0, "the child of a kernel");
  expect(cudaGraphChildGraphNodeGetGraph(second, &child) == 0 && child != other, "a child is a copy");
  expect(cudaGraphDestroy(child) != 0, "a child belongs to its parent");
  expect_complaint("not the caller's");
  launch_once(one);
  expect(counted == 1, "a kernel ran");

  // Conditions.
  cudaGraphConditionalHandleCreate(&condition, other, 0, 0);
  expect(cudaGraphInstantiate(&exec, other, 0) != 0, "a condition without a node");
  expect(loop_node(&loop, one, condition) != 0, "a condition of another graph");
  expect(loop_node(&loop, other, condition + 99) != 0, "no condition");
  expect(loop_node(&loop, other, condition, nullptr, 2) != 0, "two bodies of a loop");
  expect(loop_node(&loop, other, condition, &body) == 0, "a loop");
  expect(loop_node(&loop, other, condition) != 0, "a condition of two nodes");
  expect(cudaGraphAddChildGraphNode(&node, one, nullptr, 0, other) != 0, "a loop in a child");
  launch_once(other);
  expect_complaint("nobody has set its condition");
  kernel_node(&node, body, {}, set, condition, 1u);
  cudaGraph_t third = nullptr;
  cudaGraphCreate(&third, 0);
  cudaGraphConditionalHandleCreate(&condition, third, 1, cudaGraphCondAssignDefault);
  loop_node(&loop, third, condition, &body);
  kernel_node(&node, body, {}, set, condition, 1u);
  launch_once(third);
  expect_complaint("no end");
  kernel_node(&second, body, {node}, set, condition, 0u);
  launch_once(third);
  kernel_node(&node, one, {}, set, condition, 1u);
  launch_once(one);
  expect_complaint("not of the graph that runs");
  expect(cudaGraphInstantiate(&exec, third, 0) == 0, "an instance");
  cudaGraphExec_t twice = nullptr;
  expect(cudaGraphInstantiate(&twice, third, 0) != 0, "two instances of a loop");
  shim::add_bare_node(body, cudaGraphNodeTypeHost, nullptr);
  cudaGraphExecDestroy(exec);
  expect(cudaGraphInstantiate(&twice, third, 0) != 0, "a host function in a loop");

  // What is gone.
  expect(cudaGraphLaunch(exec, nullptr) != 0, "a launch of what was destroyed");
  cudaGraphExecDestroy(exec);
  expect_complaint("executable graph is destroyed");
  size_t size = 0;
  expect(shim::leaks() == 3, "three graphs are left");
  for (const cudaGraph_t graph : {one, other, third}) cudaGraphDestroy(graph);
  expect(cudaGraphGetNodes(one, nullptr, &size) != 0, "the nodes of what was destroyed");
  expect(cudaGraphNodeGetType(node, nullptr) != 0, "a node whose graph was destroyed");
  cudaGraphDestroy(one);
  expect_complaint("destroyed that is none");

  // Captures.
  int stream_of_capture = 0;
  const cudaStream_t stream = &stream_of_capture;
  cudaGraph_t captured = nullptr;
  const auto begin = [&] { expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == 0, "a capture"); };
  const auto end = [&](cudaError_t error, const char* what) {
    expect(cudaStreamEndCapture(stream, &captured) == error && (captured == nullptr) == (error != 0), what);
  };
  begin();
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) != 0, "a capture in a capture");
  cudaMemsetAsync(&counted, 0, sizeof counted, stream);
  end(cudaSuccess, "the end of a capture");
  expect(cudaGraphGetNodes(captured, nullptr, &size) == 0 && size == 1, "the memset");
  cudaGraphDestroy(captured);
  end(cudaErrorIllegalState, "the end of none");

  // A loop in a capture.
  cudaGraphCreate(&other, 0);
  cudaGraphConditionalHandleCreate(&condition, other, 0, cudaGraphCondAssignDefault);
  loop_node(&loop, other, condition);
  cudaGraphInstantiate(&exec, other, 0);
  begin();
  expect(cudaGraphLaunch(exec, stream) == cudaErrorStreamCaptureUnsupported, "a loop launched in a capture");
  expect(cudaMemsetAsync(&counted, 0, sizeof counted, stream) == cudaErrorStreamCaptureInvalidated, "which spoils it");
  end(cudaErrorStreamCaptureInvalidated, "and it has no graph");
  cudaGraphExecDestroy(exec);
  begin();
  expect(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported, "a wait for a capture");
  end(cudaErrorStreamCaptureInvalidated, "a capture that was waited for");
  void* pinned = nullptr;
  begin();
  expect(cudaHostAlloc(&pinned, 8, 0) == cudaErrorStreamCaptureUnsupported, "an allocation during a capture");
  end(cudaErrorStreamCaptureInvalidated, "a capture during an allocation");
  cudaGraphDestroy(other);
  expect(shim::leaks() == 0, "nothing is left of captures");

  // Streams.
  shim::lazy = true;
  cudaEvent_t event = nullptr;
  void* memory = nullptr;
  cudaEventCreateWithFlags(&event, 0);
  cudaHostAlloc(&memory, 8, 0);
  cudaMemsetAsync(&counted, 0, sizeof counted, nullptr);
  cudaMemcpyAsync(memory, &counted, sizeof counted, cudaMemcpyDeviceToHost, nullptr);
  cudaEventRecord(event, nullptr);
  expect(counted != 0, "lazy work is still to come");
  cudaEventSynchronize(event);
  expect(counted == 0, "who waits gets it");
  cudaMemcpyAsync(memory, &counted, sizeof counted, cudaMemcpyDeviceToHost, nullptr);
  cudaFreeHost(memory);
  expect_complaint("a copy to it is on its way");
  cudaEventDestroy(event);
  return wrong != 0 || !shim::complaints.empty();
}

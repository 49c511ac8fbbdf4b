// The functions that control the shim, for the tests that call it from Python.
#include "cuda_shim.h"
#include "field.h"

extern "C" {
void shim_configure(uint64_t seed, int workers) {
  shim::seed = seed;
  shim::workers = workers;
}
void shim_fail_next_launch(int error) { shim::next_error = error; }
int shim_launches() { return shim::launches; }
int shim_device() { return shim::device; }
int shim_launch_device() { return shim::launch_device; }
void* shim_launch_stream() { return shim::launch_stream; }

// Streams and graphs. Handles are addresses. A function that can fail returns its error.
void shim_lazy(int lazy) { shim::lazy = lazy != 0; }
int shim_progress(void* stream) { return shim::progress(stream); }
void shim_driver_version(int version) { shim::driver_version = version; }
void shim_fail_call(const char* name, int after, int error) {
  shim::failing_call = name;
  shim::failing_after = after;
  shim::failing_error = static_cast<cudaError_t>(error);
}
void shim_write_calls(int (*holds_gil)()) {
  shim::holds_gil = holds_gil;
  shim::calls.clear();
}
const char* shim_calls() { return shim::calls.c_str(); }
const char* shim_complaints() { return shim::complaints.c_str(); }
void shim_forget_complaints() { shim::complaints.clear(); }
int shim_last_error() { return cudaGetLastError(); }
int shim_leaks() { return shim::leaks(); }
int shim_begin_capture(void* stream) { return cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal); }
void* shim_end_capture(void* stream) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream, &graph);
  return graph;
}
void* shim_new_graph() {
  cudaGraph_t graph = nullptr;
  cudaGraphCreate(&graph, 0);
  return graph;
}
int shim_destroy_graph(void* graph) { return cudaGraphDestroy(static_cast<cudaGraph_t>(graph)); }
void* shim_add_node(void* graph, int type, void* after) {
  return shim::add_bare_node(static_cast<cudaGraph_t>(graph), static_cast<cudaGraphNodeType>(type),
                             static_cast<cudaGraphNode_t>(after));
}
int shim_add_child(void* graph, void* child) {
  cudaGraphNode_t node;
  return cudaGraphAddChildGraphNode(&node, static_cast<cudaGraph_t>(graph), nullptr, 0,
                                    static_cast<cudaGraph_t>(child));
}
void* shim_instantiate(void* graph) {
  cudaGraphExec_t exec = nullptr;
  cudaGraphInstantiate(&exec, static_cast<cudaGraph_t>(graph), 0);
  return exec;
}
int shim_launch(void* exec, void* stream) { return cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), stream); }
int shim_destroy_exec(void* exec) { return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec)); }
int shim_copy(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}
int shim_fill(void* to, int value, int64_t bytes, void* stream) { return cudaMemsetAsync(to, value, bytes, stream); }
int shim_field(int dtype, int64_t n, void* f, const void* t, const void* y, node_cuda::Launch on) {
  return node_cuda::launch_field(dtype, n, f, t, y, on);
}
}

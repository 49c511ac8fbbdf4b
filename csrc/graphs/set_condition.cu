// set_condition: one thread says whether a loop in a graph goes round once more, from ctl's `active`. A node of a graph
// and never a launch: a condition is that of the graph that it was made for.
#include "graphs/set_condition.h"

#include "common/launch.h"

namespace node_cuda {

#if NODE_CUDA_HAS_WHILE

__global__ void set_condition_kernel(cudaGraphConditionalHandle condition, const ControllerState* ctl) {
  cudaGraphSetConditional(condition, ctl->active ? 1 : 0);
}

cudaError_t add_set_condition(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                              cudaGraphConditionalHandle condition, const ControllerState* ctl) {
  void* arguments[] = {&condition, &ctl};
  cudaKernelNodeParams kernel{};
  kernel.func = NODE_CUDA_FUNCTION(set_condition_kernel);
  kernel.gridDim = kernel.blockDim = dim3(1, 1, 1);
  kernel.kernelParams = arguments;
  return cudaGraphAddKernelNode(node, graph, after, count, &kernel);
}

#endif

}  // namespace node_cuda

// set_condition: one thread sets from ctl's `active` whether a loop in a graph repeats. It is only used as a node of a
// graph, because a condition belongs to the graph that it was made for.
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

// The node of a graph that decides whether its loop goes on; set_condition.cu has the kernel.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#include "control/control.h"

// Loops in graphs, as the runtime that this is compiled with has them.
#define NODE_CUDA_HAS_WHILE (CUDART_VERSION >= 12040)

#if NODE_CUDA_HAS_WHILE
namespace node_cuda {

// A node that sets the condition to ctl->active, behind the `count` nodes at `after`.
cudaError_t add_set_condition(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                              cudaGraphConditionalHandle condition, const ControllerState* ctl);

}  // namespace node_cuda
#endif

// The graph node that decides whether its loop repeats; the kernel is in set_condition.cu.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#include "control/control.h"

// The loops in graphs that the version of the runtime supports.
#define NODE_CUDA_HAS_WHILE (CUDART_VERSION >= 12040)

#if NODE_CUDA_HAS_WHILE
namespace node_cuda {

// A node that sets the condition to ctl->active, after the `count` nodes at `after`.
cudaError_t add_set_condition(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                              cudaGraphConditionalHandle condition, const ControllerState* ctl);

}  // namespace node_cuda
#endif

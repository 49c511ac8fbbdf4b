// Nodes by hand in the graph that a stream is being captured into: what no launch in that stream could add.
//
// All of this may be called in a capture of any mode: a capture forbids what its graph would not see, such as
// allocations and waits. To build a graph is nothing of that kind, and on the one that is being captured "all
// operations other than destroy and node removal are permitted" (cudaStreamGetCaptureInfo). So no thread has to
// exchange its capture mode, as PyTorch has not for its own conditional nodes; and nothing that was added can be taken
// back.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#include "check.h"

namespace node_cuda {

// The graph, and what the stream's next node comes behind; no graph: the stream is not being captured. `last` is the
// driver's, until the next call for that stream.
struct Capturing {
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* last = nullptr;
  size_t count = 0;
};

inline Capturing capturing(cudaStream_t stream) {
  Capturing now;
  cudaStreamCaptureStatus status;
#if CUDART_VERSION >= 13000
  // An edge of another kind waits for less than a whole node. Ours are plain: they wait for all of it.
  const cudaGraphEdgeData* edges = nullptr;
  EXPECT(cudaStreamGetCaptureInfo, stream, &status, nullptr, &now.graph, &now.last, &edges, &now.count);
#else
  EXPECT(cudaStreamGetCaptureInfo, stream, &status, nullptr, &now.graph, &now.last, &now.count);
#endif
  if (status == cudaStreamCaptureStatusInvalidated)
    throw std::runtime_error(
        "node_cuda: the capture of this stream has failed: an earlier call was one that a capture forbids, or another "
        "error. End the capture, and look for its first error");
  return status == cudaStreamCaptureStatusActive ? now : Capturing();
}

// What the stream gets from now on comes behind this node, which came behind `last`.
inline void go_on_behind(cudaGraphNode_t node, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  EXPECT(cudaStreamUpdateCaptureDependencies, stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies);
#else
  EXPECT(cudaStreamUpdateCaptureDependencies, stream, &node, 1, cudaStreamSetCaptureDependencies);
#endif
}

}  // namespace node_cuda

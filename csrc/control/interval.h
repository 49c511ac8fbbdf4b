// The interval of a step. Plain C++, which also compiles without CUDA.
#pragma once

#ifdef __CUDACC__
#define NODE_CUDA_HD __host__ __device__
#else
#define NODE_CUDA_HD
#endif

namespace node_cuda {

// A step from t0 to t1 of size h > 0, and dt = direction * h. t1 was computed from h, so t1 - t0 may be rounded.
struct Interval {
  double t0, t1, h, dt;
};

}  // namespace node_cuda

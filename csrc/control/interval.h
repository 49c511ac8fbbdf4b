// The interval of a step. Plain C++, also where no CUDA is.
#pragma once

#ifdef __CUDACC__
#define NODE_CUDA_HD __host__ __device__
#else
#define NODE_CUDA_HD
#endif

namespace node_cuda {

// A step from t0 to t1 of size h > 0, and dt = direction * h. h is what t1 was made from, and not t1 - t0.
struct Interval {
  double t0, t1, h, dt;
};

}  // namespace node_cuda

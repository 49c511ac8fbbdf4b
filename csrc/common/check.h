// Turns the return value of a launcher or the runtime into a Python exception that names what failed.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace node_cuda {

inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("node_cuda: ") + (op == nullptr ? "a launch" : op) + " failed: " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

inline void check(int code) {
  if (code != cudaSuccess) check(static_cast<cudaError_t>(code), failed_op());
}

// Throws if a call of the runtime failed, and clears the error, so that a later check does not report it again.
inline void expect(cudaError_t error, const char* call) {
  if (error != cudaSuccess) cudaGetLastError();
  check(error, call);
}
#define EXPECT(call, ...) ::node_cuda::expect(call(__VA_ARGS__), #call)

}  // namespace node_cuda

// What a launcher returned, as a Python exception that names what failed.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace node_cuda {

inline void check(int code) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  const char* op = failed_op();
  throw std::runtime_error(std::string("node_cuda: ") + (op == nullptr ? "a launch" : op) + " failed: " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

}  // namespace node_cuda

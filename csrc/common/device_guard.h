// Makes a device the current one, and restores the previous one at the end.
#pragma once
#include <cuda_runtime.h>

namespace node_cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device_) error_ = cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (error_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int device_, previous_ = 0;
  cudaError_t error_;
};

}  // namespace node_cuda

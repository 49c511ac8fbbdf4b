// The kernels of step-size control: one thread, scalars only. The last block of error_ratio also does step control, and
// then no launch of these is needed.
#include "common/launch.h"

namespace node_cuda {

__global__ void step_control_kernel(ControllerState* ctl, ControllerParams law, const double* ratios, int64_t count) {
  double ratio = 0.0;
  for (int64_t i = 0; i < count; ++i) ratio = nan_max(ratio, ratios[i]);
  step_control(*ctl, law, ratio);
}

__global__ void start_control_kernel(ControllerState* ctl, ControllerParams law, double direction, const double* t0, double t0_otherwise,
                                     double h) {
  start_control(*ctl, law, direction, t0 != nullptr ? *t0 : t0_otherwise, h);
}

__global__ void grid_control_kernel(ControllerState* ctl, ControllerParams law, const double* points, int64_t count) {
  grid_control(*ctl, law, points, count);
}

__global__ void resume_kernel(ControllerState* ctl, ControllerParams law, const double* points, int64_t count) {
  resume(*ctl, law, points, count);
}

extern "C" int launch_step_control(ControllerState* ctl, const ControllerParams* law, const double* ratios, int64_t count, Launch on) {
  return launch("step_control", step_control_kernel, 1, 1, on, ctl, *law, ratios, count);
}

extern "C" int launch_start_control(ControllerState* ctl, const ControllerParams* law, double direction, const double* t0, double t0_otherwise,
                                    double h, Launch on) {
  return launch("start_control", start_control_kernel, 1, 1, on, ctl, *law, direction, t0, t0_otherwise, h);
}

extern "C" int launch_grid_control(ControllerState* ctl, const ControllerParams* law, const double* points, int64_t count, Launch on) {
  return launch("grid_control", grid_control_kernel, 1, 1, on, ctl, *law, points, count);
}

extern "C" int launch_resume(ControllerState* ctl, const ControllerParams* law, const double* points, int64_t count, Launch on) {
  return launch("resume", resume_kernel, 1, 1, on, ctl, *law, points, count);
}

extern "C" int read_control(ControllerState* host, const ControllerState* ctl, Launch on) {
  const DeviceGuard guard(on.device);
  const auto stream = static_cast<cudaStream_t>(on.stream);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = cudaMemcpyAsync(host, ctl, sizeof(ControllerState), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it
    last_failed_op = "read_control";
  }
  return error;
}

extern "C" const char* failed_op() { return last_failed_op; }

}  // namespace node_cuda

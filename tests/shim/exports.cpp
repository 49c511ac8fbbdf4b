// The shim's own controls, for the tests that drive it from Python.
#include "cuda_shim.h"

extern "C" {
void shim_configure(uint64_t seed, int workers) {
  shim::seed = seed;
  shim::workers = workers;
}
void shim_fail_next_launch(int error) { shim::next_error = error; }
int shim_launches() { return shim::launches; }
int shim_device() { return shim::device; }
int shim_launch_device() { return shim::launch_device; }
void* shim_launch_stream() { return shim::launch_stream; }
}

// The Python module node_cuda._C: the build information, and every launcher. It has no kernels and no torch headers.
//
// One line in register_launchers turns a launcher of launchers.h into a Python function with the same arguments.
// Pointers are integers (tensor.data_ptr(), the address of a struct or an array). Launch is a pair (stream, device). A
// CUDA error becomes a RuntimeError that names what failed. This module does not use autograd: the callers do.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef NODE_CUDA_WITH_KERNELS
#include <cuda_runtime_api.h>

#include "common/check.h"
#include "launchers.h"
#endif

namespace py = pybind11;

namespace node_cuda {
namespace {

#ifdef NODE_CUDA_WITH_KERNELS
// The conversion of a launcher's argument from Python.
template <class T>
struct Argument {
  using Python = T;
  static T from(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using Python = std::uintptr_t;
  static T* from(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};
// A struct that the launcher always reads, so its address must not be 0.
template <class T>
struct Required {
  using Python = std::uintptr_t;
  static const T* from(std::uintptr_t address) {
    if (address == 0) throw std::invalid_argument("node_cuda: the address of a struct that must be there is 0");
    return reinterpret_cast<const T*>(address);
  }
};
template <>
struct Argument<const StepRef*> : Required<StepRef> {};
template <>
struct Argument<const Tolerance*> : Required<Tolerance> {};
template <>
struct Argument<const Finish*> : Required<Finish> {};
template <>
struct Argument<Launch> {
  using Python = std::pair<std::uintptr_t, int32_t>;
  static Launch from(const Python& on) { return Launch{reinterpret_cast<void*>(on.first), on.second, 0}; }
};

template <class... A>
void bind(py::module_& m, const char* name, int (*launch)(A...)) {
  m.def(name, [launch](typename Argument<A>::Python... given) { check(launch(Argument<A>::from(given)...)); });
}

void register_launchers(py::module_& m) {
  bind(m, "rk_stage", launch_rk_stage);
  bind(m, "rk_finish", launch_rk_finish);
  bind(m, "stage_time", launch_stage_time);
  bind(m, "error_ratio", launch_error_ratio);
  bind(m, "scaled_error", launch_scaled_error);
  bind(m, "step_control", launch_step_control);
  bind(m, "start_control", launch_start_control);
  bind(m, "grid_control", launch_grid_control);
  bind(m, "resume", launch_resume);
  bind(m, "begin_reverse", launch_begin_reverse);
  bind(m, "load_step", launch_load_step);
  bind(m, "advance_reverse", launch_advance_reverse);
  bind(m, "initial_norms", launch_initial_norms);
  bind(m, "initial_change", launch_initial_change);
  bind(m, "dense_eval", launch_dense_eval);
  bind(m, "dense_adjoint", launch_dense_adjoint);
  bind(m, "commit", launch_commit);
  bind(m, "pack_adjoint", launch_pack_adjoint);
  bind(m, "accumulate", launch_accumulate);
  bind(m, "commit_sums", launch_commit_sums);
  bind(m, "sums_ratio", launch_sums_ratio);
  bind(m, "jump", launch_jump);
  m.def("reduce_workspace", [](int64_t n, std::uintptr_t segments) {
    return reduce_workspace(n, reinterpret_cast<const Segments*>(segments));
  });
  m.def("sums_workspace", &sums_workspace);
  m.def("chunks_of", &chunks_of);
}
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = NODE_CUDA_TORCH;
#ifdef NODE_CUDA_WITH_KERNELS
  int version = CUDART_VERSION;
  cudaRuntimeGetVersion(&version);  // the version of the library; this call needs no driver
  info["kernels"] = true;
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["archs"] = NODE_CUDA_ARCHS;
#else
  info["kernels"] = false;
  info["cuda"] = py::none();
  info["archs"] = "";
#endif
  return info;
}

}  // namespace

#ifdef NODE_CUDA_WITH_KERNELS
void register_plan(py::module_& m);    // plan.cpp
void register_graphs(py::module_& m);  // bind_graphs.cpp
void register_structs(py::module_& m);  // bind_structs.cpp
#endif

}  // namespace node_cuda

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of node_cuda: fused CUDA kernels and what they were built with.";
  m.def("build_info", &node_cuda::build_info, "kernels, the torch it was built with, the CUDA runtime, archs");
#ifdef NODE_CUDA_WITH_KERNELS
  node_cuda::register_structs(m);
  node_cuda::register_launchers(m);
  node_cuda::register_plan(m);
  node_cuda::register_graphs(m);
#endif
}

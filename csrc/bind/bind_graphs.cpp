// The Python bindings of graphs/graphs.h. Addresses are integers, and no call holds the GIL while the driver works.
#ifdef NODE_CUDA_WITH_KERNELS
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "graphs/graphs.h"

namespace py = pybind11;

namespace node_cuda {
namespace {

using Address = std::uintptr_t;
using Stream = std::pair<Address, int32_t>;  // stream and device
using Released = py::call_guard<py::gil_scoped_release>;

template <class T>
T at(Address address) {
  return reinterpret_cast<T>(address);
}

// Raises NotImplementedError, which is a RuntimeError, if the WHILE node is impossible: batches of steps work then.
std::unique_ptr<WhileGraph> make_while_graph(Address step, Address ctl, int32_t device) {
  try {
    const py::gil_scoped_release released;
    return std::make_unique<WhileGraph>(at<cudaGraph_t>(step), at<const ControllerState*>(ctl), device);
  } catch (const Impossible& why) {
    PyErr_SetString(PyExc_NotImplementedError, why.what());
    throw py::error_already_set();
  }
}

}  // namespace

void register_graphs(py::module_& m) {
  py::class_<WhileGraph>(m, "WhileGraph", py::module_local())
      .def(py::init(&make_while_graph))
      .def("launch", [](const WhileGraph& graph, Address stream) { graph.launch(at<cudaStream_t>(stream)); }, Released());
  py::class_<Flag>(m, "Flag", py::module_local())
      .def(py::init([](Address ctl, int32_t device) { return std::make_unique<Flag>(at<const ControllerState*>(ctl), device); }),
           Released())
      .def("record", [](Flag& flag, Address stream) { flag.record(at<cudaStream_t>(stream)); }, Released())
      .def("wait", &Flag::wait, Released())
      .def("read", [](const Flag& flag) { return ControllerState(flag.read()); });
  m.def(
      "replay",
      [](Address exec, int64_t times, const Stream& on) {
        replay(at<cudaGraphExec_t>(exec), times, at<cudaStream_t>(on.first), on.second);
      },
      Released());
}

}  // namespace node_cuda
#endif

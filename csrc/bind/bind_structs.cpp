// The Python bindings of the structs in device memory that Python makes or reads, so that each layout is defined once.
// Addresses are integers, of host memory.
#ifdef NODE_CUDA_WITH_KERNELS
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "control/control.h"
#include "launchers.h"

namespace py = pybind11;

namespace node_cuda {
namespace {

using Address = std::uintptr_t;
using State = ControllerState;

template <class T>
py::bytes bytes_of(const std::vector<T>& structs) {
  return py::bytes(reinterpret_cast<const char*>(structs.data()), structs.size() * sizeof(T));
}

// A read-only copy of struct ControllerState. Its attributes have the names of kernels/step_control.py::StepControl.
void register_state(py::module_& m) {
  py::class_<State> state(m, "ControllerState", py::module_local());
  state.attr("SIZE") = sizeof(State);
  state.attr("JUMP_WORD") = offsetof(State, jump) / 4;  // as words of four bytes
  state.attr("STATUS_WORD") = offsetof(State, status) / 4;
  state.def_static("copy", [](Address host) { return *reinterpret_cast<const State*>(host); });
  const auto interval = [&](const std::string& before, Interval State::*of) {
    const auto time = [&](const char* name, double Interval::*member) {
      state.def_property_readonly((before + name).c_str(), [=](const State& s) { return s.*of.*member; });
    };
    time("t0", &Interval::t0);
    time("t1", &Interval::t1);
    time("h", &Interval::h);
    time("dt", &Interval::dt);
  };
  interval("", &State::next);
  interval("last_", &State::last);
  state.def_readonly("proposal", &State::h)
      .def_readonly("carried", &State::carried)
      .def_readonly("ratio", &State::ratio)
      .def_property_readonly("history", [](const State& s) { return std::make_tuple(s.history[0], s.history[1]); })
      .def_readonly("direction", &State::direction)
      .def_property_readonly("norm_0", [](const State& s) { return s.norms[0]; })
      .def_property_readonly("norm_1", [](const State& s) { return s.norms[1]; })
      .def_readonly("attempts", &State::attempts)
      .def_readonly("accepted", &State::accepted)
      .def_readonly("rejected", &State::rejected)
      .def_readonly("next_tstop", &State::next_tstop)
      .def_readonly("next_stop", &State::next_stop)
      .def_readonly("first_output", &State::first_output)
      .def_readonly("next_output", &State::next_output)
      .def_readonly("accept", &State::accept)
      .def_readonly("jump", &State::jump)
      .def_readonly("status", &State::status)
      .def_readonly("active", &State::active)
      .def_readonly("finite", &State::finite)
      .def_readonly("paused", &State::paused)
      // The last attempt was not finite, and its step had the smallest allowed size: neither accepted nor rejected.
      .def_property_readonly("gave_up",
                             [](const State& s) { return s.status == NON_FINITE && s.next.t0 + s.h > s.next.t0; })
      // No first step could be chosen.
      .def_property_readonly("never_began", [](const State& s) {
        return s.status == NON_FINITE && s.h == 0.0 && s.accepted == 0 && s.rejected == 0;
      });
}

// A struct StepLog for `capacity` steps at `steps` in device memory, in its state after start_control.
py::bytes step_log(Address steps, int64_t capacity, int32_t first, int32_t carries) {
  StepLog log{reinterpret_cast<Recorded*>(steps), capacity, first, carries, 0, 0, 0, 0, 0};
  start_step_log(&log);
  return bytes_of(std::vector<StepLog>{log});
}

// (t0, t1, h, begins) of each of `count` structs Recorded.
std::vector<std::tuple<double, double, double, int32_t>> recorded_steps(Address steps, int64_t count) {
  std::vector<std::tuple<double, double, double, int32_t>> found;
  for (const Recorded* one = reinterpret_cast<const Recorded*>(steps); count > 0; ++one, --count)
    found.emplace_back(one->at.t0, one->at.t1, one->at.h, one->begins);
  return found;
}

// A struct Part for each tensor: addresses in device memory, sizes and dtypes. errors and totals may be empty.
py::bytes parts(const std::vector<Address>& sums, const std::vector<Address>& errors, const std::vector<Address>& totals,
                const std::vector<int64_t>& sizes, const std::vector<int64_t>& dtypes) {
  const auto of = [&](const std::vector<Address>& list, std::size_t i) {
    return list.empty() ? nullptr : reinterpret_cast<void*>(list.at(i));
  };
  std::vector<Part> found;
  int64_t chunk = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    found.push_back(Part{of(sums, i), of(errors, i), of(totals, i), sizes.at(i), chunk, dtypes.at(i)});
    chunk += chunks_of(sizes.at(i));
  }
  return bytes_of(found);
}

}  // namespace

void register_structs(py::module_& m) {
  register_state(m);
  m.def("step_log", &step_log);
  m.attr("STEP_LOG_SLOT") = offsetof(StepLog, slot) / 8;  // as words of eight bytes
  m.attr("STEP_LOG_ROW") = offsetof(StepLog, row) / 8;
  m.def("recorded_steps", &recorded_steps);
  m.attr("RECORDED_SIZE") = sizeof(Recorded);
  m.def("parts", &parts);
}

}  // namespace node_cuda
#endif

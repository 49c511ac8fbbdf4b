// The context of a solve. It binds the constants of the solve once, so that a call from Python passes only the
// addresses of a step.
//
// The context owns and allocates no device memory: Python owns the tensors and passes their addresses. Everything runs
// on the stream and device that the context was made with, and only read_control waits. `launches` counts the launches
// of its calls. `bytes` counts the traffic that the kernels declare (the sums at the top of the .cu files).
#ifdef NODE_CUDA_WITH_KERNELS
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/check.h"
#include "launchers.h"

namespace py = pybind11;

namespace node_cuda {
namespace {

using Address = std::uintptr_t;
using Entries = std::vector<std::pair<int, double>>;   // stage and coefficient, which is not zero
using DeviceArray = std::pair<Address, int64_t>;       // address and count
using Stream = std::pair<Address, int32_t>;            // stream and device

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Launch on_of(const Stream& on) { return Launch{at<void>(on.first), on.second, 0}; }

// The address at index i of a Python list.
void* item(const py::list& list, int64_t i) {
  if (i >= static_cast<int64_t>(PyList_GET_SIZE(list.ptr()))) throw py::index_error("node_cuda: a stage is missing");
  void* const address = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), i));
  if (address == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

// A row of coefficients a (for rk_finish: b and e over the same stages), and the node of the stage that it begins.
struct Row {
  std::vector<int> stage;
  std::vector<double> a, e;
  Slot slot;

  int count() const { return static_cast<int>(stage.size()); }

  void put(const Entries& entries, std::vector<double> Row::* weights) {
    for (const auto& [j, value] : entries) {
      std::size_t place = 0;
      while (place < stage.size() && stage[place] != j) ++place;
      if (place == stage.size()) {
        stage.push_back(j);
        a.push_back(0.0);
        e.push_back(0.0);
      }
      (this->*weights)[place] = value;
    }
    if (count() > MAX_TERMS) throw std::invalid_argument("node_cuda: a row has too many coefficients");
  }
};

// An interpolant: the stages and the weights of their polynomials, `degree` a stage, and those of y1 - y0.
struct Polynomials {
  std::vector<int> stage;
  std::vector<double> weights, end;
  int degree;
};

class SolveContext {
 public:
  int64_t launches = 0;
  int64_t bytes = 0;

  SolveContext(int dtype, int64_t n, int64_t itemsize, int64_t error_itemsize, const Stream& on, double direction)
      : dtype_(dtype), n_(n), size_(n * itemsize), error_size_(n * error_itemsize), on_(on_of(on)),
        direction_(direction) {}

  // A step of size h from t0 to t1, in the form that the calls below take.
  StepRef interval(double t0, double t1, double h) const {
    return StepRef{nullptr, Interval{t0, t1, h, direction_ * h}, direction_};
  }

  // The step that the control holds when the kernel runs (for dense_eval: the last judged step). The host does not know
  // it, so a captured call can be replayed for every step.
  StepRef current() const {
    if (ctl_ == nullptr) throw std::logic_error("node_cuda: a context without step control has no current step");
    return StepRef{ctl_, Interval{}, 0.0};
  }

  // Adds a row with the weights b and e of the same stages; e is empty for the row of a stage. Returns its number,
  // which rk_stage and rk_finish take.
  int row(const Entries& b, const Entries& e, double c, int64_t side) {
    Row row{{}, {}, {}, Slot{nullptr, c, side}};
    row.put(b, &Row::a);
    row.put(e, &Row::e);
    rows_.push_back(std::move(row));
    return static_cast<int>(rows_.size()) - 1;
  }

  int polynomials(std::vector<int> stage, std::vector<double> weights, std::vector<double> end, int degree) {
    if (stage.size() > MAX_TERMS || degree > MAX_DEGREE || weights.size() != stage.size() * degree)
      throw std::invalid_argument("node_cuda: dense_eval does not support this form of interpolant");
    polynomials_.push_back(Polynomials{std::move(stage), std::move(weights), std::move(end), degree});
    return static_cast<int>(polynomials_.size()) - 1;
  }

  // ends: the ends of the segments of a flat state, on the host; device_ends: the same on the device.
  void set_norm(double rtol, double atol, Address rtol_each, Address atol_each, std::vector<int64_t> ends,
                Address device_ends) {
    tolerance_ = Tolerance{rtol, atol, at<void>(rtol_each), at<void>(atol_each)};
    ends_ = std::move(ends);
    segments_ = Segments{static_cast<int64_t>(ends_.size()), at<int64_t>(device_ends), ends_.data()};
  }

  int64_t workspace_size() const { return reduce_workspace(n_, segments()); }

  void set_workspace(Address workspace) { workspace_ = at<void>(workspace); }

  // The constants in the order of kernels.reference.ControllerParams, the lists of times on the device, and the tape
  // that records the accepted steps (0: none).
  void set_law(const std::array<double, 3>& exponents, double safety, double ifactor, double dfactor, bool keep,
               bool pauses, double min_step, double max_step, double order, int64_t max_num_steps, const DeviceArray& tstops,
               Address is_jump, const DeviceArray& stops, const DeviceArray& outputs, Address tape, Address ctl) {
    for (int i = 0; i < 3; ++i) law_.exponents[i] = exponents[i];
    law_.safety = safety, law_.ifactor = ifactor, law_.dfactor = dfactor, law_.keep = keep;
    law_.pauses = pauses;
    law_.min_step = min_step, law_.max_step = max_step;
    law_.order = order, law_.max_num_steps = max_num_steps;
    law_.tstops = at<double>(tstops.first), law_.tstop_count = tstops.second;
    law_.is_jump = at<uint8_t>(is_jump);
    law_.stops = at<double>(stops.first), law_.stop_count = stops.second;
    law_.outputs = at<double>(outputs.first), law_.output_count = outputs.second;
    law_.tape = at<StepLog>(tape);
    ctl_ = at<ControllerState>(ctl);
  }

  void rk_stage(int row, const StepRef& where, Address z, Address y0, const py::list& k, Address time) {
    const Row& r = rows_.at(row);
    gather(r.stage, k);
    const Slot slot = with_time(r, time);
    declare((r.count() + 2) * size_);
    check(launch_rk_stage(dtype_, n_, at<void>(z), at<void>(y0), r.count(), x_, r.a.data(), &where, &slot, on_));
  }

  void rk_finish(int row, const StepRef& where, Address y1, Address error, Address y0, const py::list& k,
                 Address time) {
    const Row& r = rows_.at(row);
    gather(r.stage, k);
    const Slot slot = with_time(r, time);
    declare((r.count() + 2) * size_ + (error == 0 ? 0 : error_size_));
    check(launch_rk_finish(dtype_, n_, at<void>(y1), at<void>(error), at<void>(y0), r.count(), x_, r.a.data(),
                           r.e.data(), &where, &slot, on_));
  }

  // out = y0 + dt sum_j a_j x_j for coefficients that differ in each step.
  void combine(double dt, Address out, Address y0, const py::list& x, const std::vector<double>& a) {
    sum(StepRef{nullptr, Interval{0.0, 0.0, dt, dt}, 1.0}, out, y0, x, a);
  }

  // The same for dt of the step `where`, which may be known to the device only (y0 = 0: zeros).
  void sum(const StepRef& where, Address out, Address y0, const py::list& x, const std::vector<double>& a) {
    if (a.size() > MAX_TERMS || static_cast<Py_ssize_t>(a.size()) != PyList_GET_SIZE(x.ptr()))
      throw std::invalid_argument("node_cuda: a sum with too many terms, or not one coefficient a term");
    for (std::size_t j = 0; j < a.size(); ++j) x_[j] = item(x, static_cast<int64_t>(j));
    declare((static_cast<int64_t>(a.size()) + 2) * size_);
    check(launch_rk_stage(dtype_, n_, at<void>(out), at<void>(y0), static_cast<int>(a.size()), x_, a.data(), &where,
                          nullptr, on_));
  }

  // The times of stages at the nodes c, each into its own 0-d tensor.
  void stage_times(const StepRef& where, const std::vector<double>& nodes, int64_t side, const py::list& times) {
    std::array<Slot, MAX_SLOTS> slots{};
    if (nodes.size() > slots.size()) throw std::invalid_argument("node_cuda: too many stage times at once");
    for (std::size_t i = 0; i < nodes.size(); ++i)
      slots[i] = Slot{item(times, static_cast<int64_t>(i)), nodes[i], side};
    declare(0);
    check(launch_stage_time(dtype_, static_cast<int>(nodes.size()), slots.data(), &where, on_));
  }

  // Computes the norm of the error, and judges the step by the largest of this norm and the norms in `also`.
  void judge(const StepRef& where, Address error, Address last, double e_last, Address y0, Address y1,
             const DeviceArray& also) {
    const Finish finish{nullptr, ctl_, at<double>(also.first), also.second, law_};
    declare(error_size_ + (last == 0 ? 2 : 3) * size_);
    check(launch_error_ratio(dtype_, n_, at<void>(error), at<void>(last), e_last, at<void>(y0), at<void>(y1),
                             &tolerance_, segments(), workspace_, &where, &finish, on_));
  }

  // to_i = from_i for a list of states, if the last judged step was accepted.
  void commit(const py::list& to, const py::list& from) {
    const auto count = static_cast<int64_t>(PyList_GET_SIZE(to.ptr()));
    if (count > MAX_COPIES) throw std::invalid_argument("node_cuda: too many copies at once");
    void* targets[MAX_COPIES];
    for (int64_t i = 0; i < count; ++i) targets[i] = item(to, i), x_[i] = item(from, i);
    declare(2 * count * size_);
    check(launch_commit(size_, static_cast<int>(count), targets, x_, ctl_, on_));
  }

  // For a user's norm: the scaled error, which may be written over the error; judge_ratio takes its norm.
  void scaled_error(const StepRef& where, Address out, Address error, Address last, double e_last, Address y0,
                    Address y1) {
    declare(2 * error_size_ + (last == 0 ? 2 : 3) * size_);
    check(launch_scaled_error(dtype_, n_, at<void>(out), at<void>(error), at<void>(last), e_last, at<void>(y0),
                              at<void>(y1), &tolerance_, &where, on_));
  }

  void judge_ratio(const DeviceArray& ratios) {
    declare(0);
    check(launch_step_control(ctl_, &law_, at<double>(ratios.first), ratios.second, on_));
  }

  // Moves to the next step of a grid, from point to point. The control judges nothing.
  void next_of_grid(const DeviceArray& points) {
    declare(0);
    check(launch_grid_control(ctl_, &law_, at<double>(points.first), points.second, on_));
  }

  // Continues a loop that pauses at an output: to the next point of the grid, or by the error if there are no points.
  void resume(const DeviceArray& points) {
    declare(0);
    check(launch_resume(ctl_, &law_, points.second == 0 ? nullptr : at<double>(points.first), points.second, on_));
  }

  void start_control(double t0, double h) {
    declare(0);
    check(launch_start_control(ctl_, &law_, direction_, nullptr, t0, h, on_));
  }

  // The same, from a time in device memory.
  void start_control_at(Address t0, double h) {
    declare(0);
    check(launch_start_control(ctl_, &law_, direction_, at<double>(t0), 0.0, h, on_));
  }

  // These three need the control of a reverse pass over a tape; see launchers.h.
  void begin_reverse(Address tape) {
    declare(0);
    check(launch_begin_reverse(ctl_, at<StepLog>(tape), on_));
  }

  void load_step(Address tape, Address time) {
    declare(0);
    check(launch_load_step(dtype_, ctl_, at<StepLog>(tape), at<void>(time), on_));
  }

  void advance_reverse(Address tape) {
    declare(0);
    check(launch_advance_reverse(ctl_, at<StepLog>(tape), on_));
  }

  // Copies the state of the control to host memory. It waits, and other Python threads can run meanwhile.
  ControllerState read_control(Address host) {
    int code;
    {
      const py::gil_scoped_release released;
      code = node_cuda::read_control(at<ControllerState>(host), ctl_, on_);
    }
    check(code);
    return *at<const ControllerState>(host);
  }

  void initial_norms(Address y0, Address f0) {
    declare(2 * size_);
    check(launch_initial_norms(dtype_, n_, at<void>(y0), at<void>(f0), &tolerance_, segments(), workspace_, nullptr,
                               ctl_, on_));
  }

  void initial_change(Address y0, Address f0, Address f1) {
    declare(3 * size_);
    check(launch_initial_change(dtype_, n_, at<void>(y0), at<void>(f0), at<void>(f1), &tolerance_, segments(),
                                workspace_, nullptr, ctl_, &law_, on_));
  }

  // Writes the outputs [first, stop), at the times on the device, into the rows at `out`; the first row is output
  // `first`. With the current step, all times and rows are passed, and the kernel writes the outputs in that step.
  void dense_eval(int polynomials, const StepRef& where, Address out, Address times, int64_t first, int64_t stop,
                  Address y0, Address y1, const py::list& k) {
    const Polynomials& p = polynomials_.at(polynomials);
    gather(p.stage, k);
    const int64_t reads = 1 + static_cast<int64_t>(p.stage.size()) + (p.end.empty() ? 0 : 1);
    declare((reads + stop - first) * size_);
    check(launch_dense_eval(dtype_, n_, at<void>(out), at<double>(times) + first, 0, stop - first, at<void>(y0),
                            at<void>(y1), static_cast<int>(p.stage.size()), p.degree, x_, p.weights.data(),
                            p.end.empty() ? nullptr : p.end.data(), &where, on_));
  }

  // The transpose of dense_eval: reads the rows at `gradients`, and writes into `out` the cotangent of y1 plus lam,
  // that of y0, and those of the polynomials' stages in their order.
  void dense_adjoint(int polynomials, const StepRef& where, const py::list& out, Address lam, Address times,
                     Address gradients, int64_t first, int64_t stop) {
    const Polynomials& p = polynomials_.at(polynomials);
    const auto count = static_cast<int64_t>(p.stage.size());
    void* extra[MAX_TERMS];
    for (int64_t j = 0; j < count; ++j) extra[j] = item(out, 2 + j);
    declare((3 + count + stop - first) * size_);
    check(launch_dense_adjoint(dtype_, n_, item(out, 0), item(out, 1), extra, at<void>(lam), at<void>(gradients),
                               at<double>(times) + first, 0, stop - first, static_cast<int>(count), p.degree,
                               p.weights.data(), p.end.empty() ? nullptr : p.end.data(), &where, on_));
  }

 private:
  const Segments* segments() const { return segments_.count > 1 ? &segments_ : nullptr; }

  static Slot with_time(const Row& row, Address time) { return Slot{at<void>(time), row.slot.c, row.slot.side}; }

  void gather(const std::vector<int>& stages, const py::list& k) {
    for (std::size_t j = 0; j < stages.size(); ++j) x_[j] = item(k, stages[j]);
  }

  void declare(int64_t traffic) {
    ++launches;
    bytes += traffic;
  }

  int dtype_;
  int64_t n_, size_, error_size_;
  Launch on_;
  double direction_;
  std::vector<Row> rows_;
  std::vector<Polynomials> polynomials_;
  Tolerance tolerance_{};
  std::vector<int64_t> ends_;
  Segments segments_{};
  void* workspace_ = nullptr;
  ControllerParams law_{};
  ControllerState* ctl_ = nullptr;
  const void* x_[MAX_TERMS] = {};
};

// The sums over steps of a list of tensors, such as the gradients of parameters.
class SumsPlan {
 public:
  int64_t launches = 0;

  // parts: the list in device memory. sizes: the number of elements of each tensor.
  SumsPlan(Address parts, const std::vector<int64_t>& sizes, const Stream& on)
      : parts_(at<Part>(parts)), count_(static_cast<int64_t>(sizes.size())), on_(on_of(on)), x_(sizes.size()) {
    for (const int64_t size : sizes) {
      first_chunks_.push_back(chunks_);
      chunks_ += chunks_of(size);
    }
  }

  int64_t workspace_size() const { return sums_workspace(chunks_); }

  // sum_i (+)= weight dt x_i, error_i (+)= error_weight dt x_i. A weight of 0 leaves its list unchanged. An address of
  // 0 stands for zeros.
  void accumulate(const py::list& x, const StepRef& where, double weight, double error_weight, bool add) {
    launch(x, where, weight, error_weight, add, false);
  }

  // sum_i (+)= x_i, if the last judged step was accepted. where: the current step of the context.
  void keep(const py::list& x, const StepRef& where, bool add) { launch(x, where, 1.0, 0.0, add, true); }

  // total_i += sum_i. If the context judges steps, only if the last judged step was accepted.
  void commit(const StepRef& where) {
    ++launches;
    check(launch_commit_sums(parts_, count_, chunks_, where.ctl, on_));
  }

  // max_i rms error_i / (atol + rtol max(|total_i|, |total_i + sum_i|)), into one double on the device.
  void ratio(double rtol, double atol, Address workspace, Address result) {
    const Finish finish{at<double>(result), nullptr, nullptr, 0, ControllerParams{}};
    ++launches;
    check(launch_sums_ratio(parts_, count_, chunks_, rtol, atol, at<void>(workspace), nullptr, &finish, on_));
  }

 private:
  void launch(const py::list& x, const StepRef& where, double weight, double error_weight, bool add, bool accepted) {
    for (int64_t i = 0; i < count_; ++i) x_[i] = item(x, i);
    launches += (count_ + MAX_POINTERS - 1) / MAX_POINTERS;
    check(launch_accumulate(parts_, count_, chunks_, first_chunks_.data(), x_.data(), weight, error_weight, add,
                            accepted, &where, on_));
  }

  const Part* parts_;
  int64_t count_, chunks_ = 0;
  Launch on_;
  std::vector<int64_t> first_chunks_;
  std::vector<const void*> x_;
};

}  // namespace

void register_plan(py::module_& m) {
  py::class_<StepRef>(m, "StepRef", py::module_local());
  py::class_<SolveContext>(m, "SolveContext", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, const Stream&, double>())
      .def("interval", &SolveContext::interval)
      .def("current", &SolveContext::current)
      .def("row", &SolveContext::row)
      .def("polynomials", &SolveContext::polynomials)
      .def("set_norm", &SolveContext::set_norm)
      .def("set_law", &SolveContext::set_law)
      .def("workspace_size", &SolveContext::workspace_size)
      .def("set_workspace", &SolveContext::set_workspace)
      .def("rk_stage", &SolveContext::rk_stage)
      .def("rk_finish", &SolveContext::rk_finish)
      .def("combine", &SolveContext::combine)
      .def("sum", &SolveContext::sum)
      .def("stage_times", &SolveContext::stage_times)
      .def("judge", &SolveContext::judge)
      .def("commit", &SolveContext::commit)
      .def("scaled_error", &SolveContext::scaled_error)
      .def("judge_ratio", &SolveContext::judge_ratio)
      .def("start_control", &SolveContext::start_control)
      .def("start_control_at", &SolveContext::start_control_at)
      .def("next_of_grid", &SolveContext::next_of_grid)
      .def("resume", &SolveContext::resume)
      .def("begin_reverse", &SolveContext::begin_reverse)
      .def("load_step", &SolveContext::load_step)
      .def("advance_reverse", &SolveContext::advance_reverse)
      .def("read_control", &SolveContext::read_control)
      .def("initial_norms", &SolveContext::initial_norms)
      .def("initial_change", &SolveContext::initial_change)
      .def("dense_eval", &SolveContext::dense_eval)
      .def("dense_adjoint", &SolveContext::dense_adjoint)
      .def_readonly("launches", &SolveContext::launches)
      .def_readonly("bytes", &SolveContext::bytes);
  py::class_<SumsPlan>(m, "SumsPlan", py::module_local())
      .def(py::init<Address, const std::vector<int64_t>&, const Stream&>())
      .def("workspace_size", &SumsPlan::workspace_size)
      .def("accumulate", &SumsPlan::accumulate)
      .def("keep", &SumsPlan::keep)
      .def("commit", &SumsPlan::commit)
      .def("ratio", &SumsPlan::ratio)
      .def_readonly("launches", &SumsPlan::launches);
  // The step for a sum that belongs to no step: dt is 1.
  m.attr("ONE") = StepRef{nullptr, Interval{0.0, 1.0, 1.0, 1.0}, 1.0};
  m.attr("MAX_TERMS") = MAX_TERMS;
  m.attr("MAX_DEGREE") = MAX_DEGREE;
}

}  // namespace node_cuda
#endif

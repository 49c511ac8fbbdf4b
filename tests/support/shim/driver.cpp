// Calls every launcher on arrays of exact length, for the sanitizers, and prints a hash of all results.
//
//     driver <seed of the order of blocks> <workers>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_shim.h"
#include "field.h"
#include "graphs/graphs.h"
#include "launchers.h"

using namespace node_cuda;

namespace {

uint64_t hash = 1469598103934665603ull;
void add_to_hash(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const unsigned char*>(p)[i]) * 1099511628211ull;
}

// n elements of a dtype (float or half) at an address `offset` elements after an aligned one.
struct Array {
  Array(int dtype, int64_t n, int offset) : bytes(n * size(dtype)), begin(offset * size(dtype)) {
    memory = static_cast<char*>(std::malloc(begin + bytes));  // aligned to 16 bytes
    for (int64_t i = 0; i < n; ++i) {
      const float value = static_cast<float>((i * 37 + offset * 11) % 101) / 64.0f - 0.5f;
      if (dtype == FLOAT) reinterpret_cast<float*>(data())[i] = value;
      if (dtype == HALF) reinterpret_cast<__half*>(data())[i] = __float2half_rn(value);
    }
  }
  Array(const Array&) = delete;
  ~Array() {
    add_to_hash(data(), bytes);
    std::free(memory);
  }
  static int64_t size(int dtype) { return dtype == FLOAT ? 4 : 2; }
  char* data() const { return memory + begin; }

  int64_t bytes, begin;
  char* memory;
};

void check(int error) {
  if (error == 0) return;
  std::fprintf(stderr, "%s failed with error %d\n", failed_op(), error);
  std::exit(3);
}

void run(int dtype, int64_t n, int offset) {
  const Launch on{nullptr, 0, 0};
  const StepRef where{nullptr, Interval{0.0, 0.5, 0.5, -0.5}, -1.0};
  const Tolerance tolerance{1e-2, 1e-2, nullptr, nullptr};
  Array y0(dtype, n, offset), y1(dtype, n, offset), k1(dtype, n, offset), k2(dtype, n, 1), z(dtype, n, offset);
  Array error(FLOAT, n, offset), scaled(FLOAT, n, offset), row(dtype, 2 * n, offset), out(dtype, 3 * n, offset);
  Array time(dtype, 1, 0);
  std::vector<const void*> seven(7, k1.data());
  const std::vector<double> sevenths(7, 1.0 / 7);
  const void* k[2] = {k1.data(), k2.data()};
  const double a[2] = {0.25, 0.75}, times[3] = {0.1, 0.2, 0.5}, weights[4] = {1.0, -0.5, 0.0, 0.5};
  const Slot slot{time.data(), 1.0, -1};

  check(launch_rk_stage(dtype, n, z.data(), y0.data(), 2, k, a, &where, &slot, on));
  check(launch_rk_stage(dtype, n, z.data(), y0.data(), 7, seven.data(), sevenths.data(), &where, &slot, on));
  check(launch_rk_finish(dtype, n, y1.data(), error.data(), y0.data(), 7, seven.data(), sevenths.data(),
                         sevenths.data(), &where, &slot, on));
  check(launch_rk_finish(dtype, n, y1.data(), error.data(), y0.data(), 2, k, a, a, &where, &slot, on));
  check(launch_stage_time(dtype, 1, &slot, &where, on));

  const int64_t ends[2] = {n / 3, n};
  const Segments segments{2, ends, ends};
  std::vector<char> workspace(reduce_workspace(n, &segments) + reduce_workspace(n, nullptr));
  double norms[2] = {0.0, 0.0};
  ControllerState ctl;
  ControllerParams law{};
  law.safety = 0.9, law.ifactor = 10.0, law.dfactor = 0.2, law.max_step = 1e9, law.order = 5.0, law.exponents[0] = 0.2;
  law.max_num_steps = 1000;
  check(launch_start_control(&ctl, &law, 1.0, nullptr, 0.0, -1.0, on));
  check(launch_initial_norms(dtype, n, y0.data(), k1.data(), &tolerance, &segments, workspace.data(), norms, &ctl, on));
  check(launch_initial_change(dtype, n, y0.data(), k1.data(), k2.data(), &tolerance, nullptr, workspace.data(), norms,
                              &ctl, &law, on));
  const StepRef next{&ctl, Interval{}, 0.0};
  Finish finish{norms, &ctl, nullptr, 0, law};
  for (int i = 0; i < 2; ++i)
    check(launch_error_ratio(dtype, n, error.data(), k1.data(), 0.1, y0.data(), y1.data(), &tolerance, &segments,
                             workspace.data(), &next, &finish, on));
  check(launch_scaled_error(dtype, n, scaled.data(), error.data(), k1.data(), 0.1, y0.data(), y1.data(), &tolerance,
                            &where, on));
  check(launch_dense_eval(dtype, n, out.data(), times, 0, 3, y0.data(), y1.data(), 2, 2, k, weights, a, &where, on));
  check(launch_dense_eval(dtype, n, out.data(), times, 1, 2, y0.data(), y1.data(), 0, 2, k, weights, a, &where, on));
  if (dtype == FLOAT) {
    Array lam(dtype, n, offset), start(dtype, n, 1), extra(dtype, n, offset);
    void* const extras[1] = {extra.data()};
    check(launch_dense_adjoint(dtype, n, lam.data(), start.data(), extras, lam.data(), out.data(), times, 0, 3, 1, 2,
                               weights, a, &where, on));
  }
  void* to[1] = {z.data()};
  check(launch_commit(z.bytes, 1, to, k, nullptr, on));
  check(launch_pack_adjoint(dtype, n, row.data(), y0.data(), y1.data(), on));
  check(launch_jump(dtype, n, z.data(), y0.data(), y1.data(), norms, workspace.data(), on));

  Array sum(FLOAT, n, offset), errors(FLOAT, n, 0), total(FLOAT, n, 0), single(FLOAT, 1, 0), other(FLOAT, 1, 0);
  Array third(FLOAT, 1, 0);
  const int64_t first[2] = {0, chunks_of(n)}, chunks = chunks_of(n) + 1;
  const Part parts[2] = {{sum.data(), errors.data(), total.data(), n, 0, dtype},
                         {single.data(), other.data(), third.data(), 1, first[1], dtype}};
  const void* x[2] = {k1.data(), nullptr};
  std::vector<char> sums(sums_workspace(chunks));
  for (int add = 0; add < 2; ++add)
    check(launch_accumulate(parts, 2, chunks, first, x, 0.5, 0.25, add, 0, &where, on));
  finish.ctl = nullptr;
  check(launch_sums_ratio(parts, 2, chunks, 1e-2, 1e-2, sums.data(), nullptr, &finish, on));
  check(launch_commit_sums(parts, 2, chunks, nullptr, on));
  check(launch_step_control(&ctl, &law, norms, 1, on));
  add_to_hash(norms, sizeof norms);
  add_to_hash(&ctl, sizeof ctl);
}

// A solve by Heun's method. Its step is captured once, and is then repeated by a graph, and by the host.
void run_graph(int64_t n) {
  int stream = 0;
  const Launch on{&stream, 0, 0};
  const Tolerance tolerance{1e-2, 1e-2, nullptr, nullptr};
  Array y0(FLOAT, n, 0), y1(FLOAT, n, 0), z(FLOAT, n, 1), k1(FLOAT, n, 0), k2(FLOAT, n, 0);
  Array error(FLOAT, n, 0), out(FLOAT, 2 * n, 0), time(FLOAT, 3, 0);
  float* const t = reinterpret_cast<float*>(time.data());
  const double outputs[2] = {0.3, 1.0}, half[2] = {0.5, 0.5}, error_row[2] = {0.5, -0.5}, weights[1] = {1.0};
  const void* k[2] = {k1.data(), k2.data()};
  ControllerState ctl;
  ControllerParams law{};
  law.safety = 0.9, law.ifactor = 10.0, law.dfactor = 0.2, law.max_step = 1e9, law.order = 2.0, law.exponents[0] = 0.5;
  law.max_num_steps = 1000, law.outputs = outputs, law.output_count = 2;
  std::vector<char> workspace(reduce_workspace(n, nullptr));
  const StepRef next{&ctl, Interval{}, 0.0};
  const Finish finish{nullptr, &ctl, nullptr, 0, law};
  const Slot start{t, 0.0, 1}, end{t + 1, 1.0, -1};
  check(launch_start_control(&ctl, &law, 1.0, nullptr, 0.0, 0.5, on));
  cudaStreamBeginCapture(&stream, cudaStreamCaptureModeGlobal);
  check(launch_stage_time(FLOAT, 1, &start, &next, on));
  check(launch_field(FLOAT, n, k1.data(), t, y0.data(), on));
  check(launch_rk_stage(FLOAT, n, z.data(), y0.data(), 1, k, weights, &next, &end, on));
  check(launch_field(FLOAT, n, k2.data(), t + 1, z.data(), on));
  check(launch_rk_finish(FLOAT, n, y1.data(), error.data(), y0.data(), 2, k, half, error_row, &next, nullptr, on));
  check(launch_error_ratio(FLOAT, n, error.data(), nullptr, 0.0, y0.data(), y1.data(), &tolerance, nullptr,
                           workspace.data(), &next, &finish, on));
  check(launch_dense_eval(FLOAT, n, out.data(), outputs, 0, 0, y0.data(), y1.data(), 1, 1, k, weights, nullptr, &next,
                          on));
  void* to[1] = {y0.data()};
  const void* from[1] = {y1.data()};
  check(launch_commit(y0.bytes, 1, to, from, &ctl, on));
  cudaGraph_t step = nullptr;
  cudaStreamEndCapture(&stream, &step);
  shim::lazy = true;
  {
    WhileGraph loop(step, &ctl, 0);
    Flag flag(&ctl, 0);
    loop.launch(&stream);
    flag.record(&stream);
    cudaGraphExec_t again = nullptr;
    cudaGraphInstantiate(&again, step, 0);
    replay(again, 2, &stream, 0);  // changes nothing any more
    flag.wait();
    if (flag.read().active || flag.read().status != SUCCESS || flag.read().accepted < 3) std::exit(4);
    cudaGraphExecDestroy(again);
    flag.record(&stream);
  }
  cudaStreamSynchronize(&stream);
  cudaGraphDestroy(step);
  shim::lazy = false;
  std::fputs(shim::complaints.c_str(), stderr);
  if (!shim::complaints.empty() || shim::leaks() != 0) std::exit(5);
  add_to_hash(&ctl, sizeof ctl);
}

}  // namespace

int main(int, char** arguments) {
  shim::seed = std::strtoull(arguments[1], nullptr, 10);
  shim::workers = std::atoi(arguments[2]);
  for (const int dtype : {FLOAT, HALF})
    for (const int64_t n : {0, 1, 33, 5003})
      for (const int offset : {0, 1})
        if (n < 5000 || offset == 0 || dtype == FLOAT) run(dtype, n, offset);
  for (const int64_t n : {1, 5003}) run_graph(n);
  std::printf("%llx\n", static_cast<unsigned long long>(hash));
}

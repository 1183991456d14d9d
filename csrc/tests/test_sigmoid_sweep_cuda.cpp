// The sweep run on the CPU: the very source, under emulations of CUDA and of cuBLAS. It shows which tiles are formed,
// that operands, strides and transposes are those meant, that the sums do not depend on the order in which streams run,
// and how failures are reported; not speed, nor what the real library does with its arguments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <cstring>
#include <limits>

#include "reference.h"

#include "cublas.cpp"
#include "emulated_blas.h"
#include "sigmoid_loss_cuda.cu"
#include "sigmoid_sweep_cuda.cpp"

using emulation::Schedule;
using exaonepath::ElementKind;
using exaonepath::SigmoidSweep;

namespace {

// A matrix of one of the three types, and the same values in double.
struct Matrix {
  ElementKind kind;
  std::vector<unsigned char> bytes;
  std::vector<double> values;

  Matrix(ElementKind kind, const std::vector<double>& from) : kind(kind) {
    for (const double x : from) {
      const auto single = static_cast<float>(x);
      if (kind == ElementKind::kFloat32) {
        append(single, single);
      } else if (kind == ElementKind::kFloat16) {
        const __half half = __float2half_rn(single);
        append(half, value_of(half));
      } else {
        const __nv_bfloat16 half = __float2bfloat16_rn(single);
        append(half, value_of(half));
      }
    }
  }

  template <typename T>
  void append(T stored, float value) {
    const auto* at = reinterpret_cast<const unsigned char*>(&stored);
    bytes.insert(bytes.end(), at, at + sizeof stored);
    values.push_back(value);
  }
};

struct Problem {
  std::int64_t rows, cols, dim;
  Matrix u, v, gradient_u, gradient_v;
  std::vector<std::int64_t> row_ids, col_ids;

  static std::vector<double> unit_rows(std::int64_t n, std::int64_t dim, std::mt19937& random) {
    std::normal_distribution<double> normal;
    std::vector<double> values(n * dim);
    for (std::int64_t k = 0; k < n; ++k) {
      double square = 0;
      for (std::int64_t i = 0; i < dim; ++i) {
        const double x = values[k * dim + i] = normal(random);
        square += x * x;
      }
      for (std::int64_t i = 0; i < dim; ++i) values[k * dim + i] /= std::sqrt(square);
    }
    return values;
  }

  Problem(std::int64_t rows, std::int64_t cols, std::int64_t dim, ElementKind operand, ElementKind gradient,
          unsigned seed)
      : Problem(rows, cols, dim, operand, gradient, std::mt19937(seed)) {}

  Problem(std::int64_t rows, std::int64_t cols, std::int64_t dim, ElementKind operand, ElementKind gradient,
          std::mt19937 random)
      : rows(rows),
        cols(cols),
        dim(dim),
        u(operand, unit_rows(rows, dim, random)),
        v(operand, unit_rows(cols, dim, random)),
        gradient_u(gradient, u.values),
        gradient_v(gradient, v.values) {
    const auto id = [&] { return static_cast<std::int64_t>(random() % (2 * rows / 3 + 1)) << 33; };
    for (std::int64_t k = 0; k < rows; ++k) row_ids.push_back(id());
    for (std::int64_t l = 0; l < cols; ++l) col_ids.push_back(id());
  }
};

struct Result {
  std::vector<float> du, dv;
  std::vector<double> sums;
  bool operator==(const Result& other) const {
    return std::memcmp(sums.data(), other.sums.data(), sums.size() * sizeof(double)) == 0 && du == other.du &&
           dv == other.dv;
  }
};

struct Settings {
  std::int64_t tile_rows, tile_cols;
  bool overlapped = false, gradients = true;
  Schedule schedule = Schedule::kAtOnce;
};

constexpr double kParams[] = {kScale, kBias, kPosWeight};
// Two streams, so that both orders of their addresses occur.
char streams[2];

// Memory of exactly the size that is asked for, at a multiple of 256, full of NaN.
struct Workspace {
  explicit Workspace(std::int64_t bytes) : size(static_cast<std::size_t>(bytes)) {
    memory = static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256));
    std::memset(memory, 0xff, size);
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  std::size_t size;
  char* memory;
};

EmulatedBlas make_blas(void* stream) {
  EmulatedBlas blas;
  blas.stream = stream;
  blas.queue = [](void* on, std::function<void()> work) { emulation::queue(on, std::move(work)); };
  return blas;
}

SigmoidSweep arguments(const Problem& p, Result& result, const Settings& settings) {
  SigmoidSweep sweep{};
  sweep.u = p.u.bytes.data();
  sweep.v = p.v.bytes.data();
  sweep.gradient_u = p.gradient_u.bytes.data();
  sweep.gradient_v = p.gradient_v.bytes.data();
  sweep.du = settings.gradients ? result.du.data() : nullptr;
  sweep.dv = settings.gradients ? result.dv.data() : nullptr;
  sweep.operand = p.u.kind;
  sweep.gradient_operand = p.gradient_u.kind;
  sweep.row_ids = p.row_ids.data();
  sweep.col_ids = p.col_ids.data();
  sweep.params = kParams;
  sweep.sums = result.sums.data();
  sweep.rows = p.rows;
  sweep.cols = p.cols;
  sweep.dim = p.dim;
  sweep.tile_rows = settings.tile_rows;
  sweep.tile_cols = settings.tile_cols;
  sweep.stream = &streams[0];
  sweep.side_stream = settings.overlapped ? &streams[1] : nullptr;
  return sweep;
}

Result start(const Problem& p) {
  // What is there before is added to.
  Result result;
  result.du.assign(p.rows * p.dim, 0.5f);
  result.dv.assign(p.cols * p.dim, -0.25f);
  result.sums = {1, 2, 3, 4, 5, 6, 7, 8};
  return result;
}

Result run(const Problem& p, const Settings& settings) {
  Result result = start(p);
  SigmoidSweep sweep = arguments(p, result, settings);
  const Workspace workspace(exaonepath::sigmoid_sweep_workspace_cuda(sweep));
  EmulatedBlas blas = make_blas(&streams[0]);
  sweep.workspace = workspace.memory;
  sweep.blas_handle = &blas;
  emulation::schedule = settings.schedule;
  exaonepath::sigmoid_sweep_cuda(sweep);
  emulation::synchronize();
  emulation::schedule = Schedule::kAtOnce;
  return result;
}

// Against sums in long double. A product of `k` terms in one piece is rounded once to float32 (the emulation adds in
// double), a gradient once more for each tile; the pass errs as test_sigmoid_loss_cuda.cpp says.
void compare_with_reference(const Problem& p, const Settings& settings, const Result& result, const std::string& what) {
  const double half_ulp = p.gradient_u.kind == ElementKind::kFloat32 ? 0x1p-24 : 0x1p-8;
  // Pieces may be cut smaller than the largest tile, by up to a half.
  const double pieces = 2.0 * (p.rows / settings.tile_rows + p.cols / settings.tile_cols + 2);
  std::vector<long double> du(p.rows * p.dim), dv(p.cols * p.dim), du_size(du), dv_size(dv), du_slack(du), dv_slack(dv);
  long double wanted[kSigmoidSums] = {}, slack[kSigmoidSums] = {};
  for (std::int64_t k = 0; k < p.rows; ++k) {
    for (std::int64_t l = 0; l < p.cols; ++l) {
      long double dot = 0;
      for (std::int64_t i = 0; i < p.dim; ++i) dot += p.u.values[k * p.dim + i] * p.v.values[l * p.dim + i];
      const bool y = p.row_ids[k] == p.col_ids[l];
      const long double s = kScale * dot + kBias;
      const long double g = y ? -kPosWeight * sigmoid(-s) : sigmoid(s);
      const long double loss = y ? kPosWeight * softplus(-s) : softplus(s);
      const long double error = (2 * std::fabs(kScale * dot) + std::fabs(s)) * 0x1p-24L + 5 * 0x1p-23L +
                                std::fabs(s) * 0x1p-23L;
      const long double terms[] = {loss, g, g * dot, y ? 1.0L : 0.0L, y ? s : 0.0L, y ? 0.0L : s};
      for (int i = 0; i < 6; ++i) {
        wanted[i] += terms[i];
        slack[i] += std::fabs(terms[i]) * ((i < 3 ? error : 0) + 34 * 0x1p-24L);
      }
      // Where products cancel, the logit's error is that of the products' sizes.
      slack[4] += y ? kScale * std::fabs(dot) * 0x1p-23L : 0;
      slack[5] += y ? 0 : kScale * std::fabs(dot) * 0x1p-23L;
      for (std::int64_t i = 0; i < p.dim; ++i) {
        const long double to_u = g * p.gradient_v.values[l * p.dim + i], to_v = g * p.gradient_u.values[k * p.dim + i];
        du[k * p.dim + i] += to_u;
        dv[l * p.dim + i] += to_v;
        du_size[k * p.dim + i] += std::fabs(to_u);
        dv_size[l * p.dim + i] += std::fabs(to_v);
        du_slack[k * p.dim + i] += std::fabs(to_u) * (error + half_ulp);
        dv_slack[l * p.dim + i] += std::fabs(to_v) * (error + half_ulp);
      }
    }
  }
  expect(result.sums[3] - 4 == static_cast<double>(wanted[3]), what + ", count");
  for (const int i : {0, 1, 2, 4, 5}) {
    expect(std::fabs(result.sums[i] - (i + 1) - wanted[i]) <= slack[i] + 1e-14, what + ", sum " + std::to_string(i));
  }
  expect(result.sums[6] == 7 && result.sums[7] == 8, what + ", unused sums");
  const auto all = [&](const std::vector<float>& got, const std::vector<long double>& exact,
                       const std::vector<long double>& size, const std::vector<long double>& bound, float before) {
    bool close = true;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const long double rounded = (size[i] + std::fabs(before)) * pieces * 0x1p-24L;
      close = close && std::fabs(got[i] - before - exact[i]) <= bound[i] + rounded;
    }
    return close;
  };
  if (settings.gradients) {
    expect(all(result.du, du, du_size, du_slack, 0.5f), what + ", dU");
    expect(all(result.dv, dv, dv_size, dv_slack, -0.25f), what + ", dV");
  } else {
    expect(result.du == start(p).du && result.dv == start(p).dv, what + ", no gradients");
  }
}

void against_reference() {
  const std::pair<ElementKind, ElementKind> kinds[] = {{ElementKind::kFloat32, ElementKind::kFloat32},
                                                       {ElementKind::kBfloat16, ElementKind::kBfloat16},
                                                       {ElementKind::kFloat16, ElementKind::kBfloat16}};
  struct Case {
    std::int64_t rows, cols, dim, tile_rows, tile_cols;
  };
  // A block of the pass takes the emulation some ten milliseconds: few of them.
  const Case cases[] = {{1, 1, 1, 16, 24},     {3, 5, 2, 4096, 2048}, {3, 5, 2, 1, 3},     {67, 67, 37, 16, 24},
                        {1, 130, 4, 128, 128}, {19, 1, 4, 16, 5},     {70, 131, 8, 64, 64}, {10, 301, 16, 8, 128}};
  unsigned seed = 500;
  for (const auto& [operand, gradient] : kinds) {
    for (const Case& c : cases) {
      const Problem p(c.rows, c.cols, c.dim, operand, gradient, ++seed);
      Settings settings{c.tile_rows, c.tile_cols};
      const std::string what = std::to_string(c.rows) + " x " + std::to_string(c.cols) + " x " +
                               std::to_string(c.dim) + ", kinds " + std::to_string(static_cast<int>(operand)) +
                               std::to_string(static_cast<int>(gradient)) + ", tiles " + std::to_string(c.tile_rows) +
                               " x " + std::to_string(c.tile_cols);
      const Result first = run(p, settings);
      compare_with_reference(p, settings, first, what);
      settings.overlapped = true;
      for (const Schedule schedule : {Schedule::kAtOnce, Schedule::kFirstStream, Schedule::kLastStream}) {
        // What differs with the type has been seen.
        if (schedule != Schedule::kLastStream && operand == ElementKind::kFloat16) continue;
        settings.schedule = schedule;
        expect(run(p, settings) == first, what + ", two streams " + std::to_string(static_cast<int>(schedule)));
      }
      if (operand != ElementKind::kFloat32) continue;
      settings = {c.tile_rows, c.tile_cols, false, false, Schedule::kAtOnce};
      const Result sums_only = run(p, settings);
      expect(sums_only.sums == first.sums, what + ", sums only");
      expect(sums_only.du == start(p).du && sums_only.dv == start(p).dv, what + ", sums only leave gradients");
    }
  }
}

// Pairs one after another in the same memory, all queued before the first runs.
void several_pairs() {
  std::vector<Problem> problems;
  for (unsigned i = 0; i < 3; ++i) {
    problems.emplace_back(10 + 7 * i, 50 - 15 * i, 12, ElementKind::kBfloat16, ElementKind::kBfloat16, 900 + i);
  }
  for (const bool overlapped : {false, true}) {
    const Settings settings{8, 16, overlapped};
    std::vector<Result> results;
    for (const Problem& p : problems) results.push_back(start(p));
    std::int64_t bytes = 0;
    for (std::size_t i = 0; i < problems.size(); ++i) {
      bytes = std::max(bytes, exaonepath::sigmoid_sweep_workspace_cuda(arguments(problems[i], results[i], settings)));
    }
    const Workspace workspace(bytes);
    EmulatedBlas blas = make_blas(&streams[0]);
    emulation::schedule = Schedule::kLastStream;
    for (std::size_t i = 0; i < problems.size(); ++i) {
      SigmoidSweep sweep = arguments(problems[i], results[i], settings);
      sweep.workspace = workspace.memory;
      sweep.blas_handle = &blas;
      exaonepath::sigmoid_sweep_cuda(sweep);
    }
    emulation::synchronize();
    emulation::schedule = Schedule::kAtOnce;
    for (std::size_t i = 0; i < problems.size(); ++i) {
      expect(results[i] == run(problems[i], settings), "pair " + std::to_string(i) + " in shared memory");
    }
  }
}

void sizes() {
  SigmoidSweep sweep{};
  sweep.rows = sweep.cols = 1 << 20;
  sweep.tile_rows = 4096;
  sweep.tile_cols = 2048;
  sweep.gradient_operand = ElementKind::kBfloat16;
  const std::int64_t elements = 4096 * 2048, sums = exaonepath::sigmoid_workspace_cuda(4096, 2048) * 8;
  expect(exaonepath::sigmoid_sweep_workspace_cuda(sweep) == 6 * elements + sums, "one tile, whatever the batch");
  char stream;
  sweep.side_stream = &stream;
  expect(exaonepath::sigmoid_sweep_workspace_cuda(sweep) == 12 * elements + sums, "two tiles");
  sweep.side_stream = nullptr;
  sweep.gradient_operand = ElementKind::kFloat32;
  expect(exaonepath::sigmoid_sweep_workspace_cuda(sweep) == 4 * elements + sums, "float32 in place");
  sweep.rows = 10000;
  sweep.cols = 2100;
  const std::int64_t equal = 3456 * 1152;
  expect(exaonepath::sigmoid_sweep_workspace_cuda(sweep) ==
             4 * equal + 8 * exaonepath::sigmoid_workspace_cuda(3456, 1152),
         "tiles are about equal");
  sweep.rows = 0;
  expect(exaonepath::sigmoid_sweep_workspace_cuda(sweep) == 0, "nothing for an empty sweep");
}

template <typename Error, typename Call>
void fails(const std::string& message, const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return expect(error.what() == message, message + ", got: " + error.what());
  }
  expect(false, message);
}

void refuses_and_reports() {
  const Problem p(6, 7, 5, ElementKind::kFloat16, ElementKind::kBfloat16, 1);
  const Settings settings{4, 4};
  Result result = start(p);
  SigmoidSweep good = arguments(p, result, settings);
  const Workspace workspace(exaonepath::sigmoid_sweep_workspace_cuda(good));
  EmulatedBlas blas = make_blas(&streams[0]);
  good.workspace = workspace.memory;
  good.blas_handle = &blas;
  const auto changed = [&](const auto& change) {
    return [&good, change] {
      SigmoidSweep sweep = good;
      change(sweep);
      exaonepath::sigmoid_sweep_cuda(sweep);
    };
  };
  using S = SigmoidSweep&;
  refuses("negative rows", changed([](S s) { s.rows = -1; }));
  refuses("negative dim", changed([](S s) { s.dim = -1; }));
  refuses("no dim", changed([](S s) { s.dim = 0; }));
  refuses("no tile", changed([](S s) { s.tile_cols = 0; }));
  refuses("too wide", changed([](S s) { s.dim = std::int64_t{1} << 31; }));
  refuses("too large a tile", changed([](S s) { s.rows = s.cols = s.tile_rows = s.tile_cols = 1 << 30; }));
  refuses("too many rows", changed([](S s) { s.rows = s.tile_rows = std::int64_t{1} << 40; }));
  refuses("no u", changed([](S s) { s.u = nullptr; }));
  refuses("no v", changed([](S s) { s.v = nullptr; }));
  refuses("no row ids", changed([](S s) { s.row_ids = nullptr; }));
  refuses("no column ids", changed([](S s) { s.col_ids = nullptr; }));
  refuses("no params", changed([](S s) { s.params = nullptr; }));
  refuses("no sums", changed([](S s) { s.sums = nullptr; }));
  refuses("no workspace", changed([](S s) { s.workspace = nullptr; }));
  refuses("workspace askew", changed([](S s) { s.workspace = static_cast<char*>(s.workspace) + 8; }));
  refuses("no handle", changed([](S s) { s.blas_handle = nullptr; }));
  refuses("half the gradients", changed([](S s) { s.dv = nullptr; }));
  refuses("no operand of the gradients", changed([](S s) { s.gradient_v = nullptr; }));
  refuses("unknown operand", changed([](S s) { s.operand = static_cast<ElementKind>(9); }));
  refuses("gradients in float16", changed([](S s) { s.gradient_operand = ElementKind::kFloat16; }));
  refuses("another stream", changed([](S s) { s.stream = nullptr; }));
  fails<std::runtime_error>("cudaSetDevice: invalid device ordinal", changed([](S s) { s.device = 7; }));
  const Result untouched = start(p);
  expect(result == untouched, "refused calls change nothing");

  EmulatedBlas never_made = make_blas(&streams[0]);
  never_made.magic = 0;
  fails<std::runtime_error>("sigmoid sweep: cublasGetStream: CUBLAS_STATUS_NOT_INITIALIZED",
                            changed([&](S s) { s.blas_handle = &never_made; }));
  // Operands of two types, which no caller of ours makes: the library's own refusal.
  fails<std::runtime_error>("sigmoid sweep: cublasGemmEx for U V^T [4, 4, 5]: CUBLAS_STATUS_NOT_SUPPORTED", [&] {
    const exaonepath::Cublas broken{[](auto...) { return 15; }, nullptr};
    const exaonepath::Layout layout(good);
    exaonepath::Sweep(good, layout, broken).run();
  });
  for (const std::int64_t rows : {0, 6}) {
    SigmoidSweep empty{};
    empty.rows = rows;
    empty.cols = 6 - rows;
    empty.tile_rows = empty.tile_cols = 4;
    exaonepath::sigmoid_sweep_cuda(empty);
    expect(true, "an empty sweep needs nothing");
  }
  expect(std::string(exaonepath::cublas_status_name(13)) == "CUBLAS_STATUS_EXECUTION_FAILED", "name of a status");
  expect(std::string(exaonepath::cublas_status_name(99)) == "unknown cuBLAS status", "name of no status");
}

void finds_only_what_is_loaded() {
  std::string reason;
  expect(exaonepath::find_cublas(reason) == nullptr && reason.find("not loaded") != std::string::npos,
         "no cuBLAS in this process");
  expect(dlopen(EMULATED_CUBLAS, RTLD_NOW | RTLD_LOCAL) != nullptr, "the emulated cuBLAS");
  reason.clear();
  expect(exaonepath::find_cublas(reason) != nullptr && reason.empty(), "found by its name");
}

}  // namespace

int main() {
  finds_only_what_is_loaded();
  sizes();
  against_reference();
  several_pairs();
  refuses_and_reports();
  return finish();
}

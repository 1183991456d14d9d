#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "sigmoid_loss.h"
#include "sigmoid_loss_kernel.h"

namespace exaonepath {
namespace {

// 16,384 elements, 64 KB: some ten microseconds of work, and small enough for the second-level cache, with its ids.
constexpr std::int64_t kBlockRows = 8;
constexpr std::int64_t kBlockCols = 2048;
// A thread takes about 20 us to start; it should find more work than that.
constexpr std::int64_t kBlocksPerThread = 4;

struct Isa {
  const char* name;
  SigmoidBlockFunction block;
  bool (*supported)();
};

const Isa kIsas[] = {
#if defined(EXAONEPATH_X86_64)
    // The compiler's check covers the operating system too, which has to save the wider registers.
    {"avx512", sigmoid_block_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", sigmoid_block_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"sse2", sigmoid_block_sse2, [] { return true; }},
#else
    {"generic", sigmoid_block_generic, [] { return true; }},
#endif
};

const Isa& best_isa() {
  static const Isa& isa = *std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& i) { return i.supported(); });
  return isa;
}

void check(const float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld, const std::int64_t* row_ids,
           const std::int64_t* col_ids, const double* sums, int threads) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("sigmoid pass: rows and cols must not be negative");
  if (ld < cols) throw std::invalid_argument("sigmoid pass: the row stride is smaller than a row");
  if (threads < 1) throw std::invalid_argument("sigmoid pass: threads must be 1 or more");
  if (rows == 0 || cols == 0) return;
  if (!dots || !row_ids || !col_ids || !sums) throw std::invalid_argument("sigmoid pass: null pointer");
}

// Threads are started for each call, without OpenMP: torch contains its own OpenMP runtime under a private name, and a
// second runtime would keep a second set of spinning workers on the same cores. No state is left for fork() either.
template <typename Work>
void run_blocks(std::int64_t count, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto worker = [&] {
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i);
  };
  std::vector<std::thread> helpers;
  const std::int64_t useful = std::clamp<std::int64_t>(count / kBlocksPerThread, 1, threads);
  helpers.reserve(static_cast<std::size_t>(useful - 1));
  try {
    for (std::int64_t i = 1; i < useful; ++i) helpers.emplace_back(worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do all of it.
  }
  worker();
  for (std::thread& helper : helpers) helper.join();
}

void pass(const Isa& isa, float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
          const std::int64_t* row_ids, const std::int64_t* col_ids, double scale, double bias, double pos_weight,
          double* sums, int threads) {
  check(dots, rows, cols, ld, row_ids, col_ids, sums, threads);
  if (rows == 0 || cols == 0) return;
  const std::int64_t down = (rows - 1) / kBlockRows + 1;
  const std::int64_t across = (cols - 1) / kBlockCols + 1;
  // One set of sums a block, added up in order: who computed which does not show.
  std::vector<double> partial(static_cast<std::size_t>(down * across * kSigmoidSums));
  run_blocks(down * across, threads, [&](std::int64_t i) {
    const std::int64_t k = i / across * kBlockRows;
    const std::int64_t l = i % across * kBlockCols;
    const SigmoidBlock block{dots + k * ld + l,
                             row_ids + k,
                             col_ids + l,
                             std::min(kBlockRows, rows - k),
                             std::min(kBlockCols, cols - l),
                             ld,
                             static_cast<float>(scale),
                             static_cast<float>(bias),
                             static_cast<float>(pos_weight)};
    isa.block(block, partial.data() + i * kSigmoidSums);
  });
  double total[kSigmoidSums] = {};
  for (std::size_t i = 0; i < partial.size(); ++i) total[i % kSigmoidSums] += partial[i];
  for (int i = 0; i < kSigmoidSums; ++i) sums[i] += total[i];
}

}  // namespace

std::vector<std::string> sigmoid_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

void sigmoid_pass_cpu(float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld, const std::int64_t* row_ids,
                      const std::int64_t* col_ids, double scale, double bias, double pos_weight, double* sums,
                      int threads) {
  pass(best_isa(), dots, rows, cols, ld, row_ids, col_ids, scale, bias, pos_weight, sums, threads);
}

void sigmoid_pass_cpu_with(const std::string& isa, float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                           const std::int64_t* row_ids, const std::int64_t* col_ids, double scale, double bias,
                           double pos_weight, double* sums, int threads) {
  for (const Isa& candidate : kIsas) {
    if (isa == candidate.name && candidate.supported()) {
      pass(candidate, dots, rows, cols, ld, row_ids, col_ids, scale, bias, pos_weight, sums, threads);
      return;
    }
  }
  throw std::invalid_argument("sigmoid pass: this CPU or build has no instruction set \"" + isa + "\"");
}

}  // namespace exaonepath

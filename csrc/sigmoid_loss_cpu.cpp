#include <algorithm>
#include <stdexcept>

#include "cpu_isa.h"
#include "cpu_threads.h"
#include "sigmoid_loss.h"
#include "sigmoid_loss_kernel.h"

namespace exaonepath {
namespace {

// 16,384 elements, 64 KB: some ten microseconds of work, and small enough for the second-level cache, with its ids.
constexpr std::int64_t kBlockRows = 8;
constexpr std::int64_t kBlockCols = 2048;
// A thread takes about 20 us to start; it should find more work than that.
constexpr std::int64_t kBlocksPerThread = 4;

const Isa<SigmoidBlockFunction> kIsas[] = {
#if defined(EXAONEPATH_X86_64)
    {"avx512", has_avx512, sigmoid_block_avx512},
    {"avx2", has_avx2, sigmoid_block_avx2},
    {"sse2", always, sigmoid_block_sse2},
#else
    {"generic", always, sigmoid_block_generic},
#endif
};

void check(const float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld, const std::int64_t* row_ids,
           const std::int64_t* col_ids, const double* sums, int threads) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("sigmoid pass: rows and cols must not be negative");
  if (ld < cols) throw std::invalid_argument("sigmoid pass: the row stride is smaller than a row");
  if (threads < 1) throw std::invalid_argument("sigmoid pass: threads must be 1 or more");
  if (rows == 0 || cols == 0) return;
  if (!dots || !row_ids || !col_ids || !sums) throw std::invalid_argument("sigmoid pass: null pointer");
}

void pass(SigmoidBlockFunction sigmoid_block, float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
          const std::int64_t* row_ids, const std::int64_t* col_ids, double scale, double bias, double pos_weight,
          double* sums, int threads) {
  check(dots, rows, cols, ld, row_ids, col_ids, sums, threads);
  if (rows == 0 || cols == 0) return;
  const std::int64_t down = (rows - 1) / kBlockRows + 1;
  const std::int64_t across = (cols - 1) / kBlockCols + 1;
  // One set of sums a block, added up in order: who computed which does not show.
  std::vector<double> partial(static_cast<std::size_t>(down * across * kSigmoidSums));
  const std::int64_t useful = std::clamp<std::int64_t>(down * across / kBlocksPerThread, 1, threads);
  run_on_threads(down * across, static_cast<int>(useful), [&](std::int64_t i, int) {
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
    sigmoid_block(block, partial.data() + i * kSigmoidSums);
  });
  double total[kSigmoidSums] = {};
  for (std::size_t i = 0; i < partial.size(); ++i) total[i % kSigmoidSums] += partial[i];
  for (int i = 0; i < kSigmoidSums; ++i) sums[i] += total[i];
}

}  // namespace

std::vector<std::string> sigmoid_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa<SigmoidBlockFunction>& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

void sigmoid_pass_cpu(float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld, const std::int64_t* row_ids,
                      const std::int64_t* col_ids, double scale, double bias, double pos_weight, double* sums,
                      int threads) {
  pass(*find_isa(kIsas, ""), dots, rows, cols, ld, row_ids, col_ids, scale, bias, pos_weight, sums, threads);
}

void sigmoid_pass_cpu_with(const std::string& isa, float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                           const std::int64_t* row_ids, const std::int64_t* col_ids, double scale, double bias,
                           double pos_weight, double* sums, int threads) {
  const SigmoidBlockFunction* sigmoid_block = find_isa(kIsas, isa);
  if (!sigmoid_block) {
    throw std::invalid_argument("sigmoid pass: this CPU or build has no instruction set \"" + isa + "\"");
  }
  pass(*sigmoid_block, dots, rows, cols, ld, row_ids, col_ids, scale, bias, pos_weight, sums, threads);
}

}  // namespace exaonepath

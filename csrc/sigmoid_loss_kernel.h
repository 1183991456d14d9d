// The inner loop of the CPU pass, compiled once for each instruction set (see CMakeLists.txt).
#pragma once

#include <cstdint>

namespace exaonepath {

// A rectangle of the tile, and what sigmoid_loss.h says about it; the constants are already float32.
struct SigmoidBlock {
  float* dots;                  // [rows, cols], row stride ld
  const std::int64_t* row_ids;  // [rows]
  const std::int64_t* col_ids;  // [cols]
  std::int64_t rows, cols, ld;
  float scale, bias, pos_weight;
};

// Turns the block into gradients and sets `sums`, of kSigmoidSums doubles, to its sums.
using SigmoidBlockFunction = void (*)(const SigmoidBlock& block, double* sums);

void sigmoid_block_avx512(const SigmoidBlock& block, double* sums);
void sigmoid_block_avx2(const SigmoidBlock& block, double* sums);
void sigmoid_block_sse2(const SigmoidBlock& block, double* sums);
void sigmoid_block_generic(const SigmoidBlock& block, double* sums);

}  // namespace exaonepath

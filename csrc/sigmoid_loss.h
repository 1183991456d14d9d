// The fused elementwise pass of the all-pairwise sigmoid loss: logits in, dL/d(logit) out, and the sums the loss needs.
//
// A matrix library forms a tile of products, the pass turns it into gradients, and the library forms the gradients of
// the embeddings from what the pass left, so that no matrix of all pairs is ever kept. On the CPU the caller calls the
// library (sigmoid_pass_cpu); on CUDA one call does all tiles (sigmoid_sweep_cuda). For every element (k, l) of a tile
//     s = scale * dots[k, l] + bias          y = (row_ids[k] == col_ids[l])
//     loss += y ? pos_weight * softplus(-s) : softplus(s)
//     g     = y ? -pos_weight * sigmoid(-s) : sigmoid(s)           unnormalised dL/ds
// with softplus(x) = max(x, 0) + log1p(exp(-|x|)). Rows that are missing a modality are taken out before.
//
// Everything is added to `sums`, kSigmoidSums doubles:
//     [loss, sum g, sum g * dots, count of positives, sum s over positives, sum s over negatives, unused, unused]
// Sums run in float32 over a few dozen terms (on CUDA a term may be the sum of four neighbours), then in float64, in an
// order that the shape alone decides: results are bit-identical on repeat, on the CPU for any number of threads. NaN
// and infinity pass into loss and g.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace exaonepath {

constexpr int kSigmoidSums = 8;

// In place: `dots` holds the products on entry and g on return. Nothing is kept between calls.
//   dots     [rows, cols] float32, row k at dots + k * ld, ld >= cols; need not be aligned beyond a float
//   row_ids  [rows]       patient of each row           col_ids  [cols]   patient of each column
//   sums     [8]          added to
//   threads  >= 1         at most this many, the calling one included
// An empty tile touches nothing. Throws std::invalid_argument on sizes or null pointers that cannot be.
void sigmoid_pass_cpu(float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld, const std::int64_t* row_ids,
                      const std::int64_t* col_ids, double scale, double bias, double pos_weight, double* sums,
                      int threads);

// Instruction sets this build was given, best first, less those the CPU or its system lacks: "avx512", "avx2", "sse2"
// on x86-64, "generic" elsewhere (NEON on aarch64). sigmoid_pass_cpu uses the first.
std::vector<std::string> sigmoid_cpu_isas();

// sigmoid_pass_cpu with one of sigmoid_cpu_isas() in place of the first, for tests. Throws std::invalid_argument on any
// other name.
void sigmoid_pass_cpu_with(const std::string& isa, float* dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                           const std::int64_t* row_ids, const std::int64_t* col_ids, double scale, double bias,
                           double pos_weight, double* sums, int threads);

#ifdef EXAONEPATH_WITH_CUDA

// Type of the elements of a matrix. Gradients of float16 embeddings are bfloat16: float16 has the range 6e-8 to 65504,
// so sigmoid(-17) is already zero in it and a pos_weight above 65504 infinite; bfloat16 has float32's range.
enum class ElementKind : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Doubles that sigmoid_pass_cuda needs as its workspace for a tile of this size.
std::int64_t sigmoid_workspace_cuda(std::int64_t rows, std::int64_t cols);

// Queues the pass over one tile on `stream` of device number `device` and returns; pointers are memory of that device.
//   dots       [rows, cols] float32, row stride ld_dots >= cols
//   grad       [rows, cols] of grad_kind, row stride ld_grad >= cols; no part of `dots`, except that float32 may be
//              `dots` itself with the same stride
//   row_ids    [rows]       col_ids [cols]
//   params     [3] double   scale, bias, pos_weight: on the device, so that learned ones need no synchronisation
//   workspace  [sigmoid_workspace_cuda(rows, cols)] double, contents irrelevant
//   sums       [8] double   added to, in stream order
// Fastest where both base pointers are 16-byte aligned and both strides multiples of 4; right everywhere.
// exp, log and 1/x are the hardware's approximations (about 2 ulp each), results below 1.2e-38 are flushed to zero.
// An empty tile launches nothing. Throws std::invalid_argument on impossible arguments, std::runtime_error with CUDA's
// own message where a call fails.
void sigmoid_pass_cuda(const float* dots, void* grad, ElementKind grad_kind, std::int64_t rows, std::int64_t cols,
                       std::int64_t ld_dots, std::int64_t ld_grad, const std::int64_t* row_ids,
                       const std::int64_t* col_ids, const double* params, double* workspace, double* sums, int device,
                       void* stream);

// One pair of modalities. All matrices are row-major without padding, all pointers memory of device number `device`.
struct SigmoidSweep {
  const void* u;                // [rows, dim] of `operand`: unit rows
  const void* v;                // [cols, dim] of `operand`
  const void* gradient_u;       // [rows, dim] of `gradient_operand`: the same rows; `u` if the types are the same
  const void* gradient_v;       // [cols, dim] of `gradient_operand`
  float* du;                    // [rows, dim] G V is added; null, together with dv: sums only
  float* dv;                    // [cols, dim] G^T U is added
  ElementKind operand;          // of U V^T
  ElementKind gradient_operand;  // of G V and G^T U, and of G between them: float32, or bfloat16
  const std::int64_t* row_ids;  // [rows]
  const std::int64_t* col_ids;  // [cols]
  const double* params;         // [3] scale, bias, pos_weight
  double* sums;                 // [8] added to
  std::int64_t rows, cols, dim;
  std::int64_t tile_rows, tile_cols;  // of the largest tile, >= 1; tiles are as equal as multiples of 128 allow
  void* workspace;              // [sigmoid_sweep_workspace_cuda(sweep)] bytes at a multiple of 256, contents irrelevant
  int device;
  void* stream;
  void* side_stream;            // null, or another stream: the pass of a tile then runs there, at the same time as the
                                // product of the next tile, and the workspace holds two tiles
  void* blas_handle;            // cublasHandle_t whose stream is `stream`
};

// Bytes of workspace: one tile (two with a side stream) of products and of gradients, and the sums of its blocks.
// `workspace` and all other pointers but `side_stream` are not read. Throws std::invalid_argument on impossible sizes.
std::int64_t sigmoid_sweep_workspace_cuda(const SigmoidSweep& sweep);

// Queues all tiles of a pair and returns: for each tile U V^T, the pass, and both products of the gradients. Nothing is
// allocated and nothing waits for the device, so the call can be captured into a CUDA graph; when `stream` is done with
// it, the side stream is too. The order of all sums depends on the sizes only, and not on the side stream. The products
// are cuBLAS's, in the mode of the handle (TF32 for float32 if torch allows it).
// An empty sweep queues nothing. Throws std::invalid_argument on impossible arguments, std::runtime_error if a call of
// CUDA or cuBLAS fails, or if cuBLAS is not found.
void sigmoid_sweep_cuda(const SigmoidSweep& sweep);

#endif

}  // namespace exaonepath

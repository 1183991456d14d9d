// Attention of one head of one segment, compiled once for each instruction set (see CMakeLists.txt).
#pragma once

#include <cstdint>

namespace exaonepath {

// Some rows of a float32 matrix [rows, dim]; elements of a row are contiguous.
struct AttentionRows {
  const float* data;
  std::int64_t stride;  // from row to row
};

// One head of one segment, or of some of its queries.
struct AttentionHead {
  AttentionRows q;                     // [queries, dim]
  AttentionRows k, v;                  // [keys, dim]
  const float *q_cos, *q_sin;          // [queries, dim / 2], the rotation of the queries; or null
  const float *k_cos, *k_sin;          // [keys, dim / 2], the rotation of the keys; or null
  std::int64_t queries, keys, dim;     // dim is a multiple of kAttentionDims
  float scale;
};

constexpr std::int64_t kAttentionDims = 16;  // the head dimension must be a multiple of it: the widest vector
// Queries that are computed together are a multiple of this number, except for the last ones.
constexpr std::int64_t kAttentionRows = 12;

// The functions here are static: the linker keeps one copy of an inline function, and must not find one that only a
// newer CPU can run.

// Queries that are computed together: with their scores they should stay in the second-level cache.
static inline std::int64_t attention_block(std::int64_t keys) {
  const std::int64_t fitting = (std::int64_t{1} << 15) / (keys + 1) / kAttentionRows * kAttentionRows;
  return fitting < kAttentionRows ? kAttentionRows : fitting > 96 ? 96 : fitting;
}

// Keys are padded to whole pairs of vectors.
static inline std::int64_t attention_padded(std::int64_t keys) { return (keys + 31) / 32 * 32; }

// Floats of workspace, 64-byte aligned, for a segment of `keys`.
static inline std::int64_t attention_workspace(std::int64_t keys, std::int64_t dim) {
  return attention_padded(keys) * 2 * dim + attention_block(keys) * (attention_padded(keys) + dim) + 32 * dim;
}
static inline std::int64_t attention_backward_workspace(std::int64_t keys, std::int64_t dim) {
  return attention_padded(keys) * 5 * dim + attention_block(keys) * (2 * attention_padded(keys) + 3 * dim) + 32 * dim;
}

// out[i] = softmax over j of (q[i] . k[j] * scale), times v; out [queries, dim] may be q itself.
using AttentionFunction = void (*)(const AttentionHead& head, float* out, std::int64_t out_stride, float* workspace);

// Gradients of a whole segment (queries == keys, the same tokens), from the gradient of its output. Softmax is computed
// again.
struct AttentionGradients {
  AttentionRows dout;
  float *dq, *dk, *dv;      // [keys, dim] each, set
  std::int64_t dq_stride, dk_stride, dv_stride;
};
using AttentionBackwardFunction = void (*)(const AttentionHead& head, const AttentionGradients& gradients,
                                           float* workspace);

// attention_rotate: to[i] = row i of `from`, rotated by angles [rows, dim / 2] (sign 1) or back (sign -1); null: not
// rotated.
#define EXAONEPATH_DECLARE_ATTENTION(isa)                                                                          \
  void attention_##isa(const AttentionHead& head, float* out, std::int64_t out_stride, float* workspace);          \
  void attention_backward_##isa(const AttentionHead& head, const AttentionGradients& gradients, float* workspace); \
  void attention_rotate_##isa(AttentionRows from, const float* cos, const float* sin, float sign,                  \
                              std::int64_t rows, std::int64_t dim, float* to, std::int64_t to_stride);
EXAONEPATH_DECLARE_ATTENTION(avx512)
EXAONEPATH_DECLARE_ATTENTION(avx2)
EXAONEPATH_DECLARE_ATTENTION(sse2)
EXAONEPATH_DECLARE_ATTENTION(generic)
#undef EXAONEPATH_DECLARE_ATTENTION

}  // namespace exaonepath

// Attention over packed tokens, restricted to segments, on the CPU in float32: all segments in one call, with the 2D
// rotation of queries and keys inside.
//
// torch's attention takes one call a segment, whose cost exceeds that of the products of short segments, and a rotation
// before it moves all queries and keys through memory twice. For the tokens of a segment and each head
//     out = softmax(q k^T scale) v
// with q and k rotated: dimensions (d, d + dim / 2) form a pair, which is rotated by one angle.
//
// One thread computes a query of a head, all keys at once, in an order that the lengths alone decide: results are
// bit-identical on repeat, for any number of threads, and do not depend on other segments. Keys or queries that torch
// has rotated give the same bits as a rotation here. NaN and infinity stay in their segment.
#pragma once

#include <cstdint>
#include <string>

namespace exaonepath {

// A float32 tensor [tokens, heads, dim] whose last dimension is contiguous; strides in elements.
template <typename T>
struct Tokens {
  T* data;
  std::int64_t token_stride, head_stride;

  T* at(std::int64_t token, std::int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Attention {
  Tokens<const float> q, k, v;
  const float *q_cos, *q_sin;  // [tokens of q, dim / 2]; both null: queries are not rotated
  const float *k_cos, *k_sin;  // [tokens of k, dim / 2]; both null: keys are not rotated (or are already)
  const std::int64_t* pieces;  // [count, 4]: first query, queries, first key, keys; queries of one piece only once
  std::int64_t count, heads;
  std::int64_t dim;  // a multiple of 16
  double scale;
};

// out [tokens of q, heads, dim] is set at the queries of all pieces, and may be q itself. At most `threads` threads,
// the calling one included. `isa` is for tests: one of sigmoid_cpu_isas(), or empty for the best. Throws
// std::invalid_argument on sizes or null pointers that cannot be, std::bad_alloc.
void attention_cpu(const Attention& attention, Tokens<float> out, int threads, const std::string& isa = "");

// Gradients from dout, the gradient of the output; the softmax is computed again. The queries and keys of a piece are
// the same tokens. dq, dk and dv are set at the tokens of all pieces.
void attention_backward_cpu(const Attention& attention, Tokens<const float> dout, Tokens<float> dq, Tokens<float> dk,
                            Tokens<float> dv, int threads, const std::string& isa = "");

}  // namespace exaonepath

// Compiled several times, with -DEXAONEPATH_ISA=avx2 and so on, the vector width, and the flags of that instruction
// set. So this file must not use templates of the standard library: the linker keeps one copy of an inline function for
// the whole program, and must not find one that only a newer CPU can run.
//
// Segments are short, so a matrix library would spend its time on calls. All products here are one small loop
// (`tile`), whose operands stay in the first two levels of the cache, and a query sees all its keys at once: no running
// maximum, and nothing to keep for the backward pass but the inputs.
#include "attention_kernel.h"

#define EXAONEPATH_JOIN(name, isa) name##_##isa
#define EXAONEPATH_NAME(name, isa) EXAONEPATH_JOIN(name, isa)

namespace exaonepath {
namespace {

constexpr auto rotate = EXAONEPATH_NAME(attention_rotate, EXAONEPATH_ISA);
constexpr int kWidth = EXAONEPATH_VECTOR_BYTES / 4;
constexpr int kPanel = 2 * kWidth;
// A tile of kRows x 2 vectors of results, two vectors of one operand and one number of the other fill the registers: 32
// of AVX-512, 16 of the others.
constexpr int kRows = EXAONEPATH_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kChain = 128;

typedef float Floats __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
typedef std::uint32_t Bits __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
using Index = std::int64_t;

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats all(float x) { return x - Floats{}; }
inline Index smaller(Index a, Index b) { return a < b ? a : b; }

inline float sum_of(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}
inline float max_of(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  }
  return lanes[0];
}

// exp(x) for x <= 0, within 2 ulp; 0 below -87, where float32 loses digits. NaN passes.
inline Floats exponential(Floats x) {
  const Floats low = all(-87.0f);
  const Ints kept = ~(x < low);
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, left in the low bits
  const Floats shifted = x * all(1.44269504088896341f) + magic;
  const Floats n = shifted - magic;
  // ln(2) in two parts: n times the first is exact.
  const Floats r = (x - n * all(0.693145751953125f)) - n * all(1.42860682030941723e-6f);
  // exp(r) = 1 + r + r^2 Q(r): minimax, 3.1e-9 relative
  const Floats r2 = r * r;
  const Floats q_high = (all(0.008368716875f) * r + all(0.04166838803f)) + r2 * all(0.001381459955f);
  const Floats q = (all(0.1666652063f) * r + all(0.4999999345f)) + r2 * q_high;
  const Floats exp_r = all(1.0f) + (q * r2 + r);
  const Floats power = (Floats)(((Bits)shifted << 23) + (127u << 23));
  return (Floats)((Ints)(exp_r * power) & kept);
}

// A left operand whose element (i, k) is data[i * row + k * column]: a matrix, or the transpose of one.
struct Left {
  const float* data;
  Index row, column;
};

// M rows, N vectors of c (+)= a b, with b [depth, N vectors].
template <int M, int N>
void tile(Left a, const float* b, Index b_stride, Index depth, float* c, Index c_stride, bool add) {
  Floats sums[M][N] = {};
  for (Index k = 0; k < depth; ++k) {
    Floats right[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) right[n] = load(b + k * b_stride + n * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Floats left = all(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[i][n] += left * right[n];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* to = c + i * c_stride + n * kWidth;
      store(to, add ? load(to) + sums[i][n] : sums[i][n]);
    }
  }
}

template <int M, int N>
void last_rows(Index rows, Left a, const float* b, Index b_stride, Index depth, float* c, Index c_stride, bool add) {
  if constexpr (M > 0) {
    if (rows == M) {
      tile<M, N>(a, b, b_stride, depth, c, c_stride, add);
    } else {
      last_rows<M - 1, N>(rows, a, b, b_stride, depth, c, c_stride, add);
    }
  }
}

// N vectors of c (+)= a b for any number of rows.
template <int N>
void strip(Index rows, Left a, const float* b, Index b_stride, Index depth, float* c, Index c_stride, bool add) {
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_stride) {
    tile<kRows, N>(a, b, b_stride, depth, c, c_stride, add);
  }
  last_rows<kRows - 1, N>(rows, a, b, b_stride, depth, c, c_stride, add);
}

// c [rows, dim] (+)= a b, with b [depth, dim]. Sums are formed kChain terms at a time, and then added up: in one chain of
// thousands of keys the rounding errors would exceed those of other libraries, which also work in blocks.
void product(Index rows, Left a, const float* b, Index depth, Index dim, float* c, Index c_stride, bool add) {
  for (Index k = 0; k < depth; k += kChain, a.data += kChain * a.column, b += kChain * dim, add = true) {
    const Index terms = smaller(kChain, depth - k);
    Index d = 0;
    for (; d + kPanel <= dim; d += kPanel) strip<2>(rows, a, b + d, dim, terms, c + d, c_stride, add);
    if (d < dim) strip<1>(rows, a, b + d, dim, terms, c + d, c_stride, add);
  }
}

// c [rows, keys, padded to a vector] = a b^T, with b [keys, dim] packed by `pack_transposed`; sums as in `product`.
void scores(Index rows, const float* a, const float* b, Index keys, Index dim, float* c, Index c_stride) {
  for (Index j = 0; j < keys; j += kPanel) {
    for (Index k = 0; k < dim; k += kChain) {
      const Left left{a + k, dim, 1};
      const float* const right = b + j * dim + k * kPanel;
      const Index terms = smaller(kChain, dim - k);
      if (keys - j > kWidth) {
        strip<2>(rows, left, right, kPanel, terms, c + j, c_stride, k > 0);
      } else {
        strip<1>(rows, left, right, kPanel, terms, c + j, c_stride, k > 0);
      }
    }
  }
}

// rows [n, dim] to panels of kPanel columns, each [dim, kPanel]; columns behind the last row are 0.
void pack_transposed(const float* rows, Index n, Index dim, float* panels) {
  for (Index j = 0; j < n; j += kPanel, panels += kPanel * dim) {
    const Index columns = smaller(kPanel, n - j);
    for (Index d = 0; d < dim; ++d) {
      float* to = panels + d * kPanel;
      const float* from = rows + j * dim + d;
      for (Index i = 0; i < columns; ++i) to[i] = from[i * dim];
      for (Index i = columns; i < kPanel; ++i) to[i] = 0;
    }
  }
}

Index whole_vectors(Index n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Scores of one row to exp((score - largest) * scale), 0 behind the last key; returns 1 / their sum.
float softmax(float* row, Index keys, float scale) {
  const Index padded = whole_vectors(keys);
  for (Index j = keys; j < padded; ++j) row[j] = -__builtin_inff();
  Floats largest = load(row);
  for (Index j = kWidth; j < padded; j += kWidth) {
    const Floats x = load(row + j);
    largest = x > largest ? x : largest;
  }
  const Floats top = all(max_of(largest));
  Floats sum{};
  for (Index j = 0; j < padded; j += kWidth) {
    const Floats e = exponential((load(row + j) - top) * all(scale));
    sum += e;
    store(row + j, e);
  }
  return 1.0f / sum_of(sum);
}

// Gradients of the probabilities of one row to gradients of its scores, and exponentials to probabilities.
void softmax_backward(float* exponentials, float* gradients, float inverse, Index keys, float scale) {
  const Index padded = whole_vectors(keys);
  for (Index j = keys; j < padded; ++j) gradients[j] = 0;
  Floats sum{};
  for (Index j = 0; j < padded; j += kWidth) {
    const Floats p = load(exponentials + j) * all(inverse);
    store(exponentials + j, p);
    sum += p * load(gradients + j);
  }
  const Floats delta = all(sum_of(sum));
  for (Index j = 0; j < padded; j += kWidth) {
    store(gradients + j, load(exponentials + j) * (load(gradients + j) - delta) * all(scale));
  }
}

void attend(const AttentionHead& head, float* out, Index out_stride, float* workspace) {
  const Index keys = head.keys, dim = head.dim, padded = attention_padded(keys), block = attention_block(keys);
  float* const k = workspace;  // first the rows of all keys, then in their place those of all values
  float* const panels = k + padded * dim;
  float* const q = panels + padded * dim;
  float* const s = q + block * dim;
  rotate(head.k, head.k_cos, head.k_sin, 1, keys, dim, k, dim);
  pack_transposed(k, keys, dim, panels);
  rotate(head.v, nullptr, nullptr, 1, keys, dim, k, dim);
  for (Index i = 0; i < head.queries; i += block) {
    const Index rows = smaller(block, head.queries - i);
    const Index angles = i * dim / 2;
    rotate({head.q.data + i * head.q.stride, head.q.stride}, head.q_cos ? head.q_cos + angles : nullptr,
           head.q_cos ? head.q_sin + angles : nullptr, 1, rows, dim, q, dim);
    scores(rows, q, panels, keys, dim, s, padded);
    float inverse[96];
    for (Index r = 0; r < rows; ++r) inverse[r] = softmax(s + r * padded, keys, head.scale);
    product(rows, {s, padded, 1}, k, keys, dim, out + i * out_stride, out_stride, false);
    for (Index r = 0; r < rows; ++r) {
      float* row = out + (i + r) * out_stride;
      for (Index d = 0; d < dim; d += kWidth) store(row + d, load(row + d) * all(inverse[r]));
    }
  }
}

void attend_backward(const AttentionHead& head, const AttentionGradients& to, float* workspace) {
  const Index n = head.keys, dim = head.dim, padded = attention_padded(n), block = attention_block(n);
  float* const k = workspace;
  float* const k_panels = k + padded * dim;
  float* const v_panels = k_panels + padded * dim;
  float* const dk = v_panels + padded * dim;
  float* const dv = dk + padded * dim;
  float* const q = dv + padded * dim;
  float* const dout = q + block * dim;
  float* const dq = dout + block * dim;
  float* const p = dq + block * dim;
  float* const ds = p + block * padded;
  rotate(head.v, nullptr, nullptr, 1, n, dim, k, dim);
  pack_transposed(k, n, dim, v_panels);
  rotate(head.k, head.k_cos, head.k_sin, 1, n, dim, k, dim);
  pack_transposed(k, n, dim, k_panels);
  for (Index i = 0; i < n; i += block) {
    const Index rows = smaller(block, n - i);
    const float* const cos = head.q_cos ? head.q_cos + i * dim / 2 : nullptr;
    const float* const sin = head.q_cos ? head.q_sin + i * dim / 2 : nullptr;
    rotate({head.q.data + i * head.q.stride, head.q.stride}, cos, sin, 1, rows, dim, q, dim);
    rotate({to.dout.data + i * to.dout.stride, to.dout.stride}, nullptr, nullptr, 1, rows, dim, dout, dim);
    scores(rows, q, k_panels, n, dim, p, padded);
    scores(rows, dout, v_panels, n, dim, ds, padded);
    for (Index r = 0; r < rows; ++r) {
      const float inverse = softmax(p + r * padded, n, head.scale);
      softmax_backward(p + r * padded, ds + r * padded, inverse, n, head.scale);
    }
    product(rows, {ds, padded, 1}, k, n, dim, dq, dim, false);
    rotate({dq, dim}, cos, sin, -1, rows, dim, to.dq + i * to.dq_stride, to.dq_stride);
    product(n, {p, 1, padded}, dout, rows, dim, dv, dim, i > 0);
    product(n, {ds, 1, padded}, q, rows, dim, dk, dim, i > 0);
  }
  rotate({dk, dim}, head.k_cos, head.k_sin, -1, n, dim, to.dk, to.dk_stride);
  rotate({dv, dim}, nullptr, nullptr, 1, n, dim, to.dv, to.dv_stride);
}

}  // namespace

void EXAONEPATH_NAME(attention, EXAONEPATH_ISA)(const AttentionHead& head, float* out, std::int64_t out_stride,
                                                float* workspace) {
  attend(head, out, out_stride, workspace);
}

void EXAONEPATH_NAME(attention_backward, EXAONEPATH_ISA)(const AttentionHead& head, const AttentionGradients& gradients,
                                                         float* workspace) {
  attend_backward(head, gradients, workspace);
}

}  // namespace exaonepath

// Compiled several times, with -DEXAONEPATH_KERNEL=sigmoid_block_avx2 and so on, the vector width, and the flags of
// that instruction set. So this file must not use templates of the standard library: the linker keeps one copy of
// an inline function for the whole program, and must not find one that only a newer CPU can run.
#include "sigmoid_loss_kernel.h"

namespace exaonepath {
namespace {

constexpr int kWidth = EXAONEPATH_VECTOR_BYTES / 4;
// Vectors added up in float32 before they go to float64: sums of 16 equal terms err by at most 8 * 2^-24.
constexpr int kVectors = 16;
constexpr int kSegment = kWidth * kVectors;

typedef float Floats __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
typedef std::uint32_t Bits __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(2 * EXAONEPATH_VECTOR_BYTES)));

// Full vectors lie where the caller's memory has them, with the alignment of a float.
inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Ints load(const std::int32_t* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Floats all(float x) { return x - Floats{}; }
inline Floats keep(Floats x, Ints mask) { return (Floats)((Ints)x & mask); }

struct Sums {
  Doubles loss{}, grad{}, grad_dot{}, positive{}, negative{};
};
struct Partial {
  Floats loss{}, grad{}, grad_dot{}, positive{}, negative{};

  void add_to(Sums& sums) const {
    sums.loss += __builtin_convertvector(loss, Doubles);
    sums.grad += __builtin_convertvector(grad, Doubles);
    sums.grad_dot += __builtin_convertvector(grad_dot, Doubles);
    sums.positive += __builtin_convertvector(positive, Doubles);
    sums.negative += __builtin_convertvector(negative, Doubles);
  }
};

struct Activation {
  Floats softplus, sigmoid;
};

// softplus(t) and sigmoid(t), each within 3 ulp of float32, subnormal results included; NaN and infinity pass.
inline Activation activation(Floats t) {
  // z = exp(-|t|) = 2^n * exp(r), |r| <= ln(2) / 2. Past 110 it is zero in float32; the comparison lets a NaN by.
  const Floats magnitude = (Floats)((Ints)t & INT32_MAX);
  const Floats limit = all(110.0f);
  const Floats a = limit < magnitude ? limit : magnitude;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, left in the low bits
  const Floats shifted = magic - a * all(1.44269504088896341f);
  const Floats n = shifted - magic;
  // ln(2) in two parts: n times the first is exact.
  const Floats r = -(a + n * all(0.693145751953125f)) - n * all(1.42860682030941723e-6f);
  // exp(r) = 1 + r + r^2 Q(r): minimax, 3.1e-9 relative. Polynomials are summed in pairs: a chain of fourteen dependent
  // products would leave the units idle.
  const Floats r2 = r * r;
  const Floats q_high = (all(0.008368716875f) * r + all(0.04166838803f)) + r2 * all(0.001381459955f);
  const Floats q = (all(0.1666652063f) * r + all(0.4999999345f)) + r2 * q_high;
  const Floats exp_r = all(1.0f) + (q * r2 + r);
  // 2^(n + 64), then 2^-64: the one rounding of a subnormal result is the last product's.
  const Floats power = (Floats)(((Bits)shifted << 23) + ((127u + 64u) << 23));
  const Floats z = exp_r * power * all(5.42101086242752217e-20f);

  // log1p(z) = z + z^2 P(z) on [0, 1]: minimax, 5.1e-9 relative
  const Floats z2 = z * z;
  const Floats z4 = z2 * z2;
  const Floats p01 = all(0.333305113f) * z + all(-0.4999993276f);
  const Floats p23 = all(0.1969539994f) * z + all(-0.2495858727f);
  const Floats p45 = all(0.1068055387f) * z + all(-0.1535539498f);
  const Floats p67 = all(0.0202045814f) * z + all(-0.05766443309f);
  const Floats p_high = (p67 * z2 + p45) + z4 * all(-0.003318472238f);
  const Floats p = (p23 * z2 + p01) + z4 * p_high;
  const Floats log1p = p * z2 + z;

  Activation result;
  result.softplus = (t > Floats{} ? t : Floats{}) + log1p;
  result.sigmoid = (t < Floats{} ? z : all(1.0f)) / (all(1.0f) + z);
  return result;
}

// kSegment elements, all of them negatives.
inline void negatives(float* dots, const SigmoidBlock& block, Sums& sums) {
  Partial part;
  for (int i = 0; i < kSegment; i += kWidth) {
    const Floats dot = load(dots + i);
    const Floats s = dot * all(block.scale) + all(block.bias);
    const Activation f = activation(s);
    part.loss += f.softplus;
    part.grad += f.sigmoid;
    part.grad_dot += f.sigmoid * dot;
    part.negative += s;
    store(dots + i, f.sigmoid);
  }
  part.add_to(sums);
}

// The first `lanes` floats at p, the rest zero; and back.
inline Floats load_some(const float* p, int lanes) {
  if (lanes == kWidth) return load(p);
  float buffer[kWidth] = {};
  for (int lane = 0; lane < lanes; ++lane) buffer[lane] = p[lane];
  return load(buffer);
}
inline void store_some(float* p, Floats v, int lanes) {
  if (lanes == kWidth) return store(p, v);
  float buffer[kWidth];
  store(buffer, v);
  for (int lane = 0; lane < lanes; ++lane) p[lane] = buffer[lane];
}

// Up to kSegment elements, classified by `kinds`: for each 1, or -1 for a positive, then 0 up to a whole vector.
void mixed(float* dots, int count, const std::int32_t* kinds, const SigmoidBlock& block, Sums& sums) {
  Partial part;
  for (int i = 0; i < count; i += kWidth) {
    const int lanes = count - i < kWidth ? count - i : kWidth;
    const Ints kind = load(kinds + i);
    const Ints positive = kind < 0;
    const Ints negative = kind > 0;
    const Ints flip = positive & INT32_MIN;
    const Floats dot = load_some(dots + i, lanes);
    const Floats s = dot * all(block.scale) + all(block.bias);
    const Activation f = activation((Floats)((Ints)s ^ flip));
    const Floats weight = positive ? all(block.pos_weight) : all(1.0f);
    const Floats grad = (Floats)((Ints)(weight * f.sigmoid) ^ flip);
    part.loss += keep(weight * f.softplus, positive | negative);
    part.grad += keep(grad, positive | negative);
    part.grad_dot += keep(grad * dot, positive | negative);
    part.positive += keep(s, positive);
    part.negative += keep(s, negative);
    store_some(dots + i, grad, lanes);
  }
  part.add_to(sums);
}

inline bool any_equal(const std::int64_t* ids, std::int64_t id) {
  std::int64_t found = 0;
  for (int i = 0; i < kSegment; ++i) found |= ids[i] == id;
  return found != 0;
}

double total(const Doubles& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace

void EXAONEPATH_KERNEL(const SigmoidBlock& block, double* out) {
  Sums sums;
  std::int64_t positives = 0;
  for (std::int64_t k = 0; k < block.rows; ++k) {
    float* row = block.dots + k * block.ld;
    const std::int64_t id = block.row_ids[k];
    for (std::int64_t l = 0; l < block.cols; l += kSegment) {
      const std::int64_t left = block.cols - l;
      const std::int64_t* ids = block.col_ids + l;
      // Few pairs are positives: most segments have none, which their ids alone show.
      if (left >= kSegment && !any_equal(ids, id)) {
        negatives(row + l, block, sums);
        continue;
      }
      const int count = left < kSegment ? static_cast<int>(left) : kSegment;
      std::int32_t kinds[kSegment] = {};
      for (int i = 0; i < count; ++i) kinds[i] = ids[i] == id ? -1 : 1;
      for (int i = 0; i < count; ++i) positives += kinds[i] < 0;
      mixed(row + l, count, kinds, block, sums);
    }
  }
  out[0] = total(sums.loss);
  out[1] = total(sums.grad);
  out[2] = total(sums.grad_dot);
  out[3] = static_cast<double>(positives);
  out[4] = total(sums.positive);
  out[5] = total(sums.negative);
  out[6] = out[7] = 0;
}

}  // namespace exaonepath

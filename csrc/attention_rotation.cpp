// Compiled several times, as attention_kernel.cpp, and without the fused multiply-add: a rotated number then has the
// same bits as from `apply_rotation` (exaonepath/ops/attention/rotary.py), which rotates keys that are used again.
#include "attention_kernel.h"

namespace exaonepath {

#define EXAONEPATH_JOIN(name, isa) name##_##isa
#define EXAONEPATH_NAME(name, isa) EXAONEPATH_JOIN(name, isa)

void EXAONEPATH_NAME(attention_rotate, EXAONEPATH_ISA)(AttentionRows from, const float* cos, const float* sin,
                                                       float sign, std::int64_t rows, std::int64_t dim, float* to,
                                                       std::int64_t to_stride) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < rows; ++i, from.data += from.stride, to += to_stride) {
    if (!cos) {
      for (std::int64_t d = 0; d < dim; ++d) to[d] = from.data[d];
      continue;
    }
    const float *c = cos + i * half, *s = sin + i * half;
    for (std::int64_t d = 0; d < half; ++d) {
      const float a = from.data[d], b = from.data[d + half], si = sign * s[d];
      to[d] = a * c[d] - b * si;
      to[d + half] = b * c[d] + a * si;
    }
  }
}

}  // namespace exaonepath

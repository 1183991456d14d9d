// Compiled several times, as attention_kernel.cpp, and without the fused multiply-add: a rotated number then has the
// same bits as from `apply_rotation` (exaonepath/ops/attention/rotary.py), which rotates keys that are used again.
#include <cstddef>

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
      __builtin_memcpy(to, from.data, static_cast<std::size_t>(dim) * sizeof(float));
      continue;
    }
    const float *c = cos + i * half, *s = sin + i * half;
    const float *first = from.data, *second = from.data + half;
    float *__restrict first_to = to, *__restrict second_to = to + half;  // never the memory of `from`
    for (std::int64_t d = 0; d < half; ++d) {
      const float a = first[d], b = second[d], si = sign * s[d];
      first_to[d] = a * c[d] - b * si;
      second_to[d] = b * c[d] + a * si;
    }
  }
}

}  // namespace exaonepath

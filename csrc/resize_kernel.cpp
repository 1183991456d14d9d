// Compiled several times, as sigmoid_loss_kernel.cpp is: no templates of the standard library in this file.
#include "resize_kernel.h"

#include "resize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXAONEPATH_JOIN_(a, b) a##b
#define EXAONEPATH_JOIN(a, b) EXAONEPATH_JOIN_(a, b)

namespace exaonepath {
namespace {

constexpr std::int32_t kHalf = 1 << (kResizeBits - 1);
constexpr int kWidth = 16;                        // values that are summed up together
constexpr int kLanes = EXAONEPATH_VECTOR_BYTES / 4;  // of them in one vector
constexpr int kParts = kWidth / kLanes;

typedef std::int32_t Ints __attribute__((vector_size(EXAONEPATH_VECTOR_BYTES)));

// Bytes as whole numbers. GCC 12 converts vectors of bytes one value at a time, so the instructions are named.
inline Ints load(const std::uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return Ints{p[0], p[1], p[2], p[3]};
#endif
}

// Sixteen values: of one row, or of four pixels of four bytes in four rows.
struct Sums {
  Ints part[kParts];

  Sums() {
    for (Ints& one : part) one = kHalf - Ints{};
  }
  inline void add(const std::uint8_t* values, std::int32_t weight) {
    for (int i = 0; i < kParts; ++i) part[i] += load(values + i * kLanes) * weight;
  }
  inline void store(std::uint8_t* out) const {
    for (int i = 0; i < kParts; ++i) {
      Ints values = part[i] >> kResizeBits;
      const Ints over = values > 255;
      values = (values & ~over) | (over & 255);
#if defined(__AVX512F__)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)values));
#elif defined(__AVX2__)
      const __m256i whole = (__m256i)values;
      const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i * kLanes), _mm_packus_epi16(words, words));
#else
      for (int lane = 0; lane < kLanes; ++lane) out[i * kLanes + lane] = static_cast<std::uint8_t>(values[lane]);
#endif
    }
  }
};

// Pixels of four rows become neighbours, so that one weight is multiplied with all of them at once.
void interleave(const std::uint8_t* const rows[kResizeRows], std::int64_t width, std::uint8_t* block) {
  for (std::int64_t x = 0; x + 1 < width; ++x) {
    for (int r = 0; r < kResizeRows; ++r) __builtin_memcpy(block + (x * kResizeRows + r) * 4, rows[r] + 3 * x, 4);
  }
  // Nothing may be read behind the last pixel of an image.
  const std::int64_t last = width - 1;
  for (int r = 0; r < kResizeRows; ++r) __builtin_memcpy(block + (last * kResizeRows + r) * 4, rows[r] + 3 * last, 3);
}

void rows(const std::uint8_t* block, const std::int32_t* first, const std::int32_t* weights, std::int64_t size,
          std::int64_t taps, std::uint8_t* out, std::int64_t stride) {
  for (std::int64_t i = 0; i < size; ++i, weights += taps, out += 3) {
    const std::uint8_t* pixel = block + kWidth * static_cast<std::int64_t>(first[i]);
    Sums sums;
    for (std::int64_t t = 0; t < taps; ++t) sums.add(pixel + t * kWidth, weights[t]);
    std::uint8_t pixels[kWidth];
    sums.store(pixels);
    // The fourth byte lies where the next pixel will be.
    for (int r = 0; r < kResizeRows; ++r) __builtin_memcpy(out + r * stride, pixels + 4 * r, 4);
  }
}

void blend(const std::uint8_t* rows, std::int64_t stride, const std::int32_t* weights, std::int64_t taps,
           std::int64_t bytes, std::uint8_t* out) {
  std::int64_t x = 0;
  for (; x + kWidth <= bytes; x += kWidth) {
    Sums sums;
    for (std::int64_t t = 0; t < taps; ++t) sums.add(rows + t * stride + x, weights[t]);
    sums.store(out + x);
  }
  for (; x < bytes; ++x) {
    std::int32_t sum = kHalf;
    for (std::int64_t t = 0; t < taps; ++t) sum += rows[t * stride + x] * weights[t];
    sum >>= kResizeBits;
    out[x] = static_cast<std::uint8_t>(sum > 255 ? 255 : sum);
  }
}

}  // namespace

extern const ResizeFunctions EXAONEPATH_JOIN(resize_, EXAONEPATH_ISA);
const ResizeFunctions EXAONEPATH_JOIN(resize_, EXAONEPATH_ISA) = {interleave, rows, blend};

}  // namespace exaonepath

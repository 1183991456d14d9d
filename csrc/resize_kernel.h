// The inner loops of resizing, compiled once for each instruction set (see CMakeLists.txt).
#pragma once

#include <cstdint>

namespace exaonepath {

constexpr int kResizeRows = 4;  // rows that are resized together along x

struct ResizeFunctions {
  // Four rows, uint8 [width * 3] each, to a block, uint8 [width, 4 rows, 4]; the last byte of a pixel is not used.
  void (*interleave)(const std::uint8_t* const rows[kResizeRows], std::int64_t width, std::uint8_t* block);
  // A block along x, to four rows of uint8 [size * 3 + 1], `stride` bytes apart.
  void (*rows)(const std::uint8_t* block, const std::int32_t* first, const std::int32_t* weights, std::int64_t size,
               std::int64_t taps, std::uint8_t* out, std::int64_t stride);
  // One row of the result along y: the weighted sum of `taps` rows of `bytes` bytes, `stride` bytes apart.
  void (*blend)(const std::uint8_t* rows, std::int64_t stride, const std::int32_t* weights, std::int64_t taps,
                std::int64_t bytes, std::uint8_t* out);
};

extern const ResizeFunctions resize_avx512, resize_avx2, resize_sse2, resize_generic;

}  // namespace exaonepath

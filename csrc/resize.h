// Shrinking and enlarging 8-bit RGB images by weights that the caller has computed, in whole numbers only.
#pragma once

#include <cstdint>
#include <string>

namespace exaonepath {

// Where each result along one axis comes from: result i is the sum over t < taps of source pixel first[i] + t times
// weights[i * taps + t]. Weights are not negative, and those of a result add up to about 2^kResizeBits.
struct ResizeAxis {
  const std::int32_t* first;    // [size], not decreasing
  const std::int32_t* weights;  // [size, taps]
  std::int64_t size, taps;
};

// Bits of a weight after the point: with 255 as the largest pixel, a sum and its rounding fit into 31 bits.
constexpr int kResizeBits = 22;

// Rows first, then columns; both sums are rounded to 8 bits, so the order is a part of the result.
//   source  uint8 [height, width, 3], rows `stride` bytes apart, pixels adjacent
//   out     uint8 [rows.size, columns.size, 3], contiguous
//   isa     instruction set, as in cpu_isa.h; empty: the best
// Throws std::invalid_argument if a source pixel lies outside the image, a weight is negative, the sum of the weights
// of a result may overflow, or the instruction set is not available.
void resize_rgb(const std::uint8_t* source, std::int64_t height, std::int64_t width, std::int64_t stride,
                const ResizeAxis& rows, const ResizeAxis& columns, std::uint8_t* out, const std::string& isa);

}  // namespace exaonepath

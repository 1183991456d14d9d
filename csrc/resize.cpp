#include "resize.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu_isa.h"
#include "resize_kernel.h"

namespace exaonepath {
namespace {

const Isa<ResizeFunctions> kIsas[] = {
#if defined(EXAONEPATH_X86_64)
    {"avx512", has_avx512, resize_avx512},
    {"avx2", has_avx2, resize_avx2},
    {"sse2", always, resize_sse2},
#else
    {"generic", always, resize_generic},
#endif
};

void check(const ResizeAxis& axis, std::int64_t length, const char* what) {
  const std::string where = std::string("resize: ") + what;
  if (axis.size < 0 || axis.taps < 1) throw std::invalid_argument(where + " have no taps");
  for (std::int64_t i = 0; i < axis.size; ++i) {
    if (axis.first[i] < 0 || axis.first[i] + axis.taps > length) {
      throw std::invalid_argument(where + " need pixels outside the image");
    }
    if (i && axis.first[i] < axis.first[i - 1]) throw std::invalid_argument(where + " are not in order");
    std::int64_t sum = 0;
    for (std::int64_t t = 0; t < axis.taps; ++t) {
      const std::int32_t weight = axis.weights[i * axis.taps + t];
      if (weight < 0) throw std::invalid_argument(where + " have a negative weight");
      sum += weight;
    }
    // 255 times the sum, and a half for rounding, must fit into 31 bits.
    if (sum > (std::int64_t{1} << kResizeBits) * 2) throw std::invalid_argument(where + " have too large weights");
  }
}

}  // namespace

void resize_rgb(const std::uint8_t* source, std::int64_t height, std::int64_t width, std::int64_t stride,
                const ResizeAxis& rows, const ResizeAxis& columns, std::uint8_t* out, const std::string& isa) {
  const ResizeFunctions* functions = find_isa(kIsas, isa);
  if (!functions) throw std::invalid_argument("resize: this CPU or build has no " + isa);
  if (height < 0 || width < 0 || stride < 3 * width) throw std::invalid_argument("resize: the image has no valid size");
  check(rows, height, "rows");
  check(columns, width, "columns");
  if (!rows.size || !columns.size) return;
  const std::int64_t bytes = 3 * columns.size, begin = rows.first[0];
  const std::int64_t end = rows.first[rows.size - 1] + rows.taps;
  const std::int64_t shrunk_stride = bytes + 1, blocks = (end - begin + kResizeRows - 1) / kResizeRows;
  std::vector<std::uint8_t> block(width * kResizeRows * 4), shrunk(blocks * kResizeRows * shrunk_stride);
  std::int64_t done = begin;
  for (std::int64_t y = 0; y < rows.size; ++y) {
    // Rows are resized just before they are needed, so that they still lie in the cache.
    for (const std::int64_t needed = rows.first[y] + rows.taps; done < needed; done += kResizeRows) {
      const std::uint8_t* together[kResizeRows];
      for (int r = 0; r < kResizeRows; ++r) together[r] = source + std::min(done + r, height - 1) * stride;
      functions->interleave(together, width, block.data());
      functions->rows(block.data(), columns.first, columns.weights, columns.size, columns.taps,
                      shrunk.data() + (done - begin) * shrunk_stride, shrunk_stride);
    }
    functions->blend(shrunk.data() + (rows.first[y] - begin) * shrunk_stride, shrunk_stride,
                     rows.weights + y * rows.taps, rows.taps, bytes, out + y * bytes);
  }
}

}  // namespace exaonepath

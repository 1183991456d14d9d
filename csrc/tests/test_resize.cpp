// Resizing with every instruction set, against sums in 64 bits, in buffers that are no larger than the header says (a
// sanitizer sees every byte outside). Exit status 0 only if all are equal.
#include "resize.h"

#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Axis {
  std::vector<std::int32_t> first, weights;
  std::int64_t taps;

  exaonepath::ResizeAxis view() const {
    return {first.data(), weights.data(), static_cast<std::int64_t>(first.size()), taps};
  }
};

Axis axis(std::mt19937& random, std::int64_t length, std::int64_t size) {
  Axis made;
  made.taps = 1 + static_cast<std::int64_t>(random() % (length < 9 ? length : 9));
  for (std::int64_t i = 0; i < size; ++i) {
    made.first.push_back(static_cast<std::int32_t>(i * (length - made.taps) / (size > 1 ? size - 1 : 1)));
    for (std::int64_t t = 0; t < made.taps; ++t) {
      made.weights.push_back(static_cast<std::int32_t>((1 << exaonepath::kResizeBits) / made.taps));
    }
    // Rounded up: a white pixel then needs the limit at 255.
    made.weights.back() += static_cast<std::int32_t>(random() % 5000);
  }
  return made;
}

std::uint8_t sum(const std::uint8_t* pixel, std::int64_t step, const std::int32_t* weights, std::int64_t taps) {
  std::int64_t total = 1 << (exaonepath::kResizeBits - 1);
  for (std::int64_t t = 0; t < taps; ++t) total += static_cast<std::int64_t>(pixel[t * step]) * weights[t];
  total >>= exaonepath::kResizeBits;
  return static_cast<std::uint8_t>(total > 255 ? 255 : total);
}

std::vector<std::uint8_t> expected(const std::uint8_t* source, std::int64_t height, std::int64_t stride,
                                   const Axis& rows, const Axis& columns) {
  const auto n = static_cast<std::int64_t>(columns.first.size()), m = static_cast<std::int64_t>(rows.first.size());
  std::vector<std::uint8_t> along(height * n * 3), out(m * n * 3);
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t i = 0; i < n * 3; ++i) {
      const std::uint8_t* pixel = source + y * stride + columns.first[i / 3] * 3 + i % 3;
      along[y * n * 3 + i] = sum(pixel, 3, columns.weights.data() + i / 3 * columns.taps, columns.taps);
    }
  }
  for (std::int64_t y = 0; y < m; ++y) {
    for (std::int64_t i = 0; i < n * 3; ++i) {
      const std::uint8_t* pixel = along.data() + rows.first[y] * n * 3 + i;
      out[y * n * 3 + i] = sum(pixel, n * 3, rows.weights.data() + y * rows.taps, rows.taps);
    }
  }
  return out;
}

long checks = 0;

bool run(const std::string& isa, std::mt19937& random) {
  const std::int64_t sides[] = {1, 2, 3, 5, 16, 17, 63, 100};
  for (const std::int64_t height : sides) {
    for (const std::int64_t width : sides) {
      for (const std::int64_t size : {1, 4, 7, 33}) {
        const std::int64_t stride = 3 * width + static_cast<std::int64_t>(random() % 3);
        const std::int64_t bytes = (height - 1) * stride + 3 * width;  // nothing after the last pixel
        std::unique_ptr<std::uint8_t[]> source(new std::uint8_t[bytes]);
        for (std::int64_t i = 0; i < bytes; ++i) {
          source[i] = static_cast<std::uint8_t>(random() % 3 ? random() : 255);
        }
        const Axis rows = axis(random, height, size), columns = axis(random, width, size + 1);
        ++checks;
        const std::int64_t results = size * (size + 1) * 3;
        std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[results]);
        exaonepath::resize_rgb(source.get(), height, width, stride, rows.view(), columns.view(), out.get(), isa);
        if (std::vector<std::uint8_t>(out.get(), out.get() + results) !=
            expected(source.get(), height, stride, rows, columns)) {
          std::printf("%s: %ld x %ld to %ld differs\n", isa.c_str(), long(height), long(width), long(size));
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int found = 0;
  for (const std::string isa : {"avx512", "avx2", "sse2", "generic", ""}) {
    std::mt19937 random(7);
    try {
      if (!run(isa, random)) return 1;
      ++found;
    } catch (const std::invalid_argument& error) {
      if (std::string(error.what()).find("this CPU or build") == std::string::npos) {
        std::printf("%s\n", error.what());
        return 1;
      }
    }
  }
  std::printf("%ld checks, 0 failed\n", checks);
  return found >= 2 ? 0 : 1;
}

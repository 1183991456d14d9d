// What the tests of csrc/ share: counting checks, tiles of random products, and the pass in long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sigmoid_loss.h"

using exaonepath::kSigmoidSums;

inline int checks = 0, failures = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

template <typename Call>
void refuses(const char* what, const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return expect(true, what);
  }
  expect(false, what);
}

// The exit status of a test program.
inline int finish() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

inline long double softplus(long double x) { return std::fmax(x, 0.0L) + std::log1p(std::exp(-std::fabs(x))); }
inline long double sigmoid(long double x) {
  const long double z = std::exp(-std::fabs(x));
  return (x < 0 ? z : 1.0L) / (1.0L + z);
}

struct Tile {
  std::int64_t rows, cols, ld;
  std::vector<float> dots;  // exactly what the contract says is there, so that a sanitizer sees a step beyond
  std::vector<std::int64_t> row_ids, col_ids;
  double sums[kSigmoidSums] = {};

  Tile(std::int64_t rows, std::int64_t cols, std::int64_t ld)
      : rows(rows), cols(cols), ld(ld), dots(rows && cols ? (rows - 1) * ld + cols : 0), row_ids(rows), col_ids(cols) {}
};

inline Tile random_tile(std::int64_t rows, std::int64_t cols, std::int64_t ld, int patients, unsigned seed) {
  Tile tile(rows, cols, ld);
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> value(-1, 1);
  // Ids that differ in their high half only must not be taken for equal.
  const auto id = [&] { return static_cast<std::int64_t>(random() % patients) << 33; };
  for (float& x : tile.dots) x = value(random);
  for (auto& x : tile.row_ids) x = id();
  for (auto& x : tile.col_ids) x = id();
  return tile;
}

// Constants that float32 holds exactly, so that only the arithmetic is judged.
constexpr double kScale = 14.25, kBias = -10.125, kPosWeight = 3.5;

// Every element and sum of a pass with these constants over `before`: `g` is what it made of dots[i], `sums` what it
// added. The functions may err by `ulp` units of 2^-23 and `per_logit` * |s| in relative terms, g on top by what its
// storage does: `half_ulp` relative, `smallest` absolute. Sums of up to 32 terms may be taken in float32.
template <typename Gradient>
void compare(const Tile& before, const Gradient& g, const double* sums, const std::string& what, double ulp,
             double per_logit = 0, double half_ulp = 0, double smallest = 0) {
  long double wanted[kSigmoidSums] = {}, slack[kSigmoidSums] = {};
  bool elements = true;
  for (std::int64_t k = 0; k < before.rows; ++k) {
    for (std::int64_t l = 0; l < before.cols; ++l) {
      const float dot = before.dots[k * before.ld + l];
      const bool y = before.row_ids[k] == before.col_ids[l];
      const long double s = kScale * static_cast<long double>(dot) + kBias;
      const long double exact = y ? -kPosWeight * sigmoid(-s) : sigmoid(s);
      const long double loss = y ? kPosWeight * softplus(-s) : softplus(s);
      // Two roundings of s move the functions by as much in relative terms.
      const long double error = (std::fabs(kScale * dot) + std::fabs(s)) * 0x1p-24L + ulp * 0x1p-23L +
                                per_logit * std::fabs(s);
      const long double got = g(k * before.ld + l);
      elements = elements && std::fabs(got - exact) <= std::fabs(exact) * (error + half_ulp) + smallest;
      const long double terms[] = {loss, exact, exact * dot, y ? 1.0L : 0.0L, y ? s : 0.0L, y ? 0.0L : s};
      for (int i = 0; i < 6; ++i) {
        wanted[i] += terms[i];
        slack[i] += std::fabs(terms[i]) * ((i < 3 ? error : 0) + 32 * 0x1p-24L);
      }
    }
  }
  expect(elements, what + ", elements");
  expect(sums[3] == static_cast<double>(wanted[3]), what + ", count");
  for (const int i : {0, 1, 2, 4, 5}) {
    expect(std::fabs(sums[i] - wanted[i]) <= slack[i], what + ", sum " + std::to_string(i));
  }
}

// The CPU pass against long double, with every instruction set this machine has. Exit status 0 only where all hold.
#include <cstring>
#include <limits>

#include "reference.h"

namespace {

// Distance in units of the last place of the float nearest `wanted`, those of subnormal numbers included.
long double ulps(float got, long double wanted) {
  const float nearest = static_cast<float>(wanted);
  if (got == nearest) return 0;
  const float ulp = std::nextafter(std::fabs(nearest), std::numeric_limits<float>::infinity()) - std::fabs(nearest);
  return std::fabs(static_cast<long double>(got) - wanted) / ulp;
}

void pass(Tile& tile, const std::string& isa, double scale, double bias, double pos_weight, int threads = 1) {
  exaonepath::sigmoid_pass_cpu_with(isa, tile.dots.data(), tile.rows, tile.cols, tile.ld, tile.row_ids.data(),
                                    tile.col_ids.data(), scale, bias, pos_weight, tile.sums, threads);
}

std::vector<float> scan() {
  std::vector<float> values = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-38f, -1e-38f, 1e4f, -1e4f, 3e38f, -3e38f};
  for (int i = 0; i < 40000; ++i) {
    const float fine = -110.0f + i * (220.0f / 40000);  // through every subnormal result
    const float wide = std::ldexp(1.0f + (i % 997) / 997.0f, i % 160 - 146);
    for (const float x : {fine, wide, -wide}) values.push_back(x);
  }
  return values;
}

// Each function at each point: the fast path (no positives in sight), the mixed path, and the loss one by one.
// Bound: exp errs by 1 to 1.5 ulp (reduction of its argument, polynomial, product), then each of 1 + z and the
// quotient, or of log1p and its addition, by half of one.
void functions(const std::string& isa) {
  const std::vector<float> x = scan();
  const auto n = static_cast<std::int64_t>(x.size());
  long double worst = 0, worst_loss = 0;
  for (const int y : {0, 1}) {
    Tile tile(1, n, n);
    tile.dots = x;
    std::fill(tile.col_ids.begin(), tile.col_ids.end(), 7);
    tile.row_ids[0] = y ? 7 : 8;
    pass(tile, isa, 1, 0, 1);
    for (std::int64_t i = 0; i < n; ++i) {
      const long double wanted = y ? -sigmoid(-static_cast<long double>(x[i])) : sigmoid(x[i]);
      worst = std::max(worst, ulps(tile.dots[i], wanted));
    }
    for (std::int64_t i = 0; i < n; i += 3) {
      Tile one(1, 1, 1);
      one.dots[0] = x[i];
      one.row_ids[0] = y ? 0 : 1;
      pass(one, isa, 1, 0, 1);
      const long double wanted = softplus(y ? -static_cast<long double>(x[i]) : static_cast<long double>(x[i]));
      worst_loss = std::max(worst_loss, ulps(static_cast<float>(one.sums[0]), wanted));
    }
  }
  std::printf("%s: sigmoid within %.2Lf ulp, softplus within %.2Lf ulp\n", isa.c_str(), worst, worst_loss);
  expect(worst < 3, isa + ": sigmoid");
  expect(worst_loss < 3, isa + ": softplus");
}

void not_finite(const std::string& isa) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  // In a tail, and in a whole segment of any width.
  for (const std::int64_t n : {1, 256}) {
    for (const float x : {infinity, -infinity, nan, std::copysign(nan, -1.0f)}) {
      for (const int y : {0, 1}) {
        Tile tile = random_tile(1, n, n, 1, 1);
        tile.row_ids[0] = y ? 0 : 1;
        tile.dots[0] = x;
        pass(tile, isa, 1, 0, 1);
        const long double t = y ? -x : x;
        const float g = y ? -tile.dots[0] : tile.dots[0];
        const std::string what = isa + ": " + std::to_string(x) + (y ? " positive" : " negative");
        if (std::isnan(x)) {
          expect(std::isnan(g) && std::isnan(tile.sums[0]), what);
        } else {
          expect(g == (t > 0 ? 1 : 0), what);
          expect(t > 0 ? std::isinf(tile.sums[0]) : std::isfinite(tile.sums[0]), what + ", loss");
        }
      }
    }
  }
}

// Any shape, stride and share of positives, element by element and sum by sum.
void tiles(const std::string& isa) {
  constexpr float kUntouched = 12345.0f;
  unsigned seed = 0;
  for (const std::int64_t rows : {1, 3, 8, 17}) {
    for (const std::int64_t cols : {1, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 2047, 2048, 2049, 4111}) {
      for (const std::int64_t pad : {0, 5}) {
        for (const int patients : {1, 3, 1000}) {
          Tile tile = random_tile(rows, cols, cols + pad, patients, ++seed);
          for (std::int64_t k = 0; k + 1 < rows; ++k) {
            std::fill_n(tile.dots.begin() + k * tile.ld + cols, pad, kUntouched);
          }
          const Tile before = tile;
          pass(tile, isa, kScale, kBias, kPosWeight, 2);
          const std::string what = isa + ": " + std::to_string(rows) + " x " + std::to_string(cols) + " + " +
                                   std::to_string(pad) + ", " + std::to_string(patients) + " patients";
          // 3 ulp for the functions, one for pos_weight, one for the sign and product that follow.
          compare(before, [&](std::int64_t i) { return tile.dots[i]; }, tile.sums, what, 5);
          bool padding = true;
          for (std::int64_t k = 0; k + 1 < rows; ++k) {
            const auto end = tile.dots.begin() + (k + 1) * tile.ld;
            padding = padding && std::count(end - pad, end, kUntouched) == pad;
          }
          expect(padding, what + ", padding");
        }
      }
    }
  }
}

// A long sum of equal terms is where float32 sums drift: it must not grow with the length.
void long_sums(const std::string& isa) {
  Tile tile(64, 16384, 16384);
  std::fill(tile.dots.begin(), tile.dots.end(), 0.1f);
  std::fill(tile.row_ids.begin(), tile.row_ids.end(), 1);
  pass(tile, isa, 1, -10, 1, 2);
  const long double wanted = 64.0L * 16384 * softplus(static_cast<long double>(0.1f) - 10);
  // s rounded once at 9.9 (2^-21), the functions within 3 ulp, 16 equal terms within 8 * 2^-24.
  expect(std::fabs(tile.sums[0] / wanted - 1) < 0x1p-21 + 3 * 0x1p-23 + 8 * 0x1p-24, isa + ": long sum");
}

void repeats(const std::string& isa) {
  const Tile start = random_tile(67, 9001, 9003, 40, 5);
  Tile first = start;
  pass(first, isa, 10, -10, 2, 1);
  for (int threads = 1; threads <= 4; ++threads) {
    Tile again = start;
    pass(again, isa, 10, -10, 2, threads);
    const std::string what = isa + ": " + std::to_string(threads) + " threads";
    expect(std::memcmp(first.sums, again.sums, sizeof first.sums) == 0, what + ", sums");
    expect(std::memcmp(first.dots.data(), again.dots.data(), first.dots.size() * sizeof(float)) == 0, what);
  }
}

void adds_and_empties(const std::string& isa) {
  Tile tile(2, 2, 2);
  tile.row_ids = tile.col_ids = {0, 1};
  for (int i = 0; i < kSigmoidSums; ++i) tile.sums[i] = 100 + i;
  pass(tile, isa, 1, 0, 1);
  expect(tile.sums[3] == 105 && tile.sums[6] == 106 && tile.sums[7] == 107, isa + ": adds to the sums");
  expect(std::fabs(tile.sums[0] - (100 + 4 * std::log(2.0))) < 1e-5, isa + ": adds to the loss");
  for (const std::int64_t rows : {0, 3}) {
    double sums[kSigmoidSums] = {1, 2, 3, 4, 5, 6, 7, 8};
    exaonepath::sigmoid_pass_cpu_with(isa, nullptr, rows, 3 - rows, 3, nullptr, nullptr, 1, 0, 1, sums, 4);
    expect(sums[0] == 1 && sums[7] == 8, isa + ": empty tile");
  }
}

void bad_input() {
  Tile t = random_tile(2, 3, 3, 2, 1);
  float* x = t.dots.data();
  const auto *k = t.row_ids.data(), *l = t.col_ids.data();
  using exaonepath::sigmoid_pass_cpu;
  refuses("negative rows", [&] { sigmoid_pass_cpu(x, -1, 3, 3, k, l, 1, 0, 1, t.sums, 1); });
  refuses("negative cols", [&] { sigmoid_pass_cpu(x, 2, -3, 3, k, l, 1, 0, 1, t.sums, 1); });
  refuses("short stride", [&] { sigmoid_pass_cpu(x, 2, 3, 2, k, l, 1, 0, 1, t.sums, 1); });
  refuses("no thread", [&] { sigmoid_pass_cpu(x, 2, 3, 3, k, l, 1, 0, 1, t.sums, 0); });
  refuses("no dots", [&] { sigmoid_pass_cpu(nullptr, 2, 3, 3, k, l, 1, 0, 1, t.sums, 1); });
  refuses("no row ids", [&] { sigmoid_pass_cpu(x, 2, 3, 3, nullptr, l, 1, 0, 1, t.sums, 1); });
  refuses("no column ids", [&] { sigmoid_pass_cpu(x, 2, 3, 3, k, nullptr, 1, 0, 1, t.sums, 1); });
  refuses("no sums", [&] { sigmoid_pass_cpu(x, 2, 3, 3, k, l, 1, 0, 1, nullptr, 1); });
  refuses("unknown instruction set", [&] { pass(t, "abacus", 1, 0, 1); });
  const Tile fresh = random_tile(2, 3, 3, 2, 1);
  expect(t.dots == fresh.dots && t.sums[0] == 0, "refused calls change nothing");
}

}  // namespace

int main() {
  const std::vector<std::string> isas = exaonepath::sigmoid_cpu_isas();
  expect(!isas.empty(), "an instruction set");
#if defined(__x86_64__)
  expect(isas.back() == "sse2", "every x86-64 has SSE2");
#endif
  for (const std::string& isa : isas) {
    functions(isa);
    not_finite(isa);
    tiles(isa);
    long_sums(isa);
    repeats(isa);
    adds_and_empties(isa);
  }
  bad_input();
  return finish();
}

// The CUDA pass run on the CPU: the very source, under an emulation of what it uses of CUDA (emulation/cuda_runtime.h).
// It shows indices, edges, sums and conversions to be right; not speed, nor how the card rounds exp and 1/x.
#include <cstring>
#include <limits>

#include "reference.h"

#include "sigmoid_loss_cuda.cu"

using exaonepath::ElementKind;

namespace {

inline float value_of(float x) { return x; }

struct Result {
  std::vector<unsigned char> grad;
  std::vector<double> sums;
};

// The pass with gradients next to the products (or in their place), in rows of ld_grad elements; `skew` moves the
// products off their alignment.
template <typename Grad>
Result pass(const Tile& tile, ElementKind kind, std::int64_t ld_grad, bool in_place = false, int skew = 0) {
  const double params[] = {kScale, kBias, kPosWeight};
  std::vector<double> workspace(exaonepath::sigmoid_workspace_cuda(tile.rows, tile.cols), NAN);
  std::vector<float> dots(tile.dots.size() + skew);
  std::copy(tile.dots.begin(), tile.dots.end(), dots.begin() + skew);
  std::vector<unsigned char> grad(((tile.rows - 1) * ld_grad + tile.cols) * sizeof(Grad), 0xa5);
  std::vector<double> sums(kSigmoidSums, 0);
  void* target = in_place ? static_cast<void*>(dots.data() + skew) : grad.data();
  exaonepath::sigmoid_pass_cuda(dots.data() + skew, target, kind, tile.rows, tile.cols, tile.ld, ld_grad,
                                tile.row_ids.data(), tile.col_ids.data(), params, workspace.data(), sums.data(), 0,
                                nullptr);
  if (in_place) std::memcpy(grad.data(), target, grad.size());
  return {grad, sums};
}

template <typename Grad>
std::vector<Grad> elements(const Tile& tile, const Result& result, std::int64_t ld_grad) {
  std::vector<Grad> stored(tile.rows * tile.cols);
  for (std::int64_t k = 0; k < tile.rows; ++k) {
    std::memcpy(&stored[k * tile.cols], &result.grad[k * ld_grad * sizeof(Grad)], tile.cols * sizeof(Grad));
  }
  return stored;
}

template <typename Grad>
void check(const Tile& tile, ElementKind kind, const std::string& what, double half_ulp, double smallest) {
  // Aligned and not, by stride and by address; the vector path and the other must agree to the bit in what they store.
  std::vector<Grad> first;
  for (const std::int64_t pad : {0, 3, 4}) {
    for (const int skew : {0, 1}) {
      if (pad && skew) continue;
      const std::int64_t ld_grad = tile.ld + pad;
      const Result result = pass<Grad>(tile, kind, ld_grad, false, skew);
      const auto* grad = reinterpret_cast<const Grad*>(result.grad.data());
      const std::string which = what + " + " + std::to_string(pad) + (skew ? ", skewed" : "");
      // The argument of 2^x is rounded once, in units of |s|; 3 ulp for 1/x, products and log1p, two for pos_weight.
      const auto got = [&](std::int64_t i) { return value_of(grad[i / tile.ld * ld_grad + i % tile.ld]); };
      compare(tile, got, result.sums.data(), which, 5, 0x1p-23, half_ulp, smallest);
      const std::vector<Grad> stored = elements<Grad>(tile, result, ld_grad);
      bool padding = true;
      for (std::int64_t k = 0; k < tile.rows; ++k) {
        for (std::size_t i = (k * ld_grad + tile.cols) * sizeof(Grad);
             k + 1 < tile.rows && i < (k + 1) * ld_grad * sizeof(Grad); ++i) {
          padding = padding && result.grad[i] == 0xa5;
        }
      }
      expect(padding, which + ", padding");
      if (first.empty()) first = stored;
      expect(std::memcmp(first.data(), stored.data(), stored.size() * sizeof(Grad)) == 0, which + ", both paths");
    }
  }
}

void tiles() {
  unsigned seed = 100;
  const std::pair<int, int> shapes[] = {{1, 1}, {3, 5}, {8, 1024}, {5, 1027}, {17, 2051}, {33, 4}};
  for (const auto& [rows, cols] : shapes) {
    for (const int patients : {2, 1000}) {
      const Tile tile = random_tile(rows, cols, (cols + 3) / 4 * 4, patients, ++seed);
      const std::string what = std::to_string(rows) + " x " + std::to_string(cols) + ", " + std::to_string(patients) +
                               " patients, ";
      check<float>(tile, ElementKind::kFloat32, what + "float32", 0, 0);
      const Result separate = pass<float>(tile, ElementKind::kFloat32, tile.ld);
      const Result in_place = pass<float>(tile, ElementKind::kFloat32, tile.ld, true);
      expect(elements<float>(tile, separate, tile.ld) == elements<float>(tile, in_place, tile.ld), what + "in place");
      expect(separate.sums == in_place.sums, what + "sums in place");
      if (patients != 2) continue;  // what differs with the storage has been seen
      check<__half>(tile, ElementKind::kFloat16, what + "float16", 0x1p-11, 0x1p-25);
      check<__nv_bfloat16>(tile, ElementKind::kBfloat16, what + "bfloat16", 0x1p-8, 0);
    }
  }
}

void not_finite() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float x : {infinity, -infinity, nan, std::copysign(nan, -1.0f)}) {
    for (const int y : {0, 1}) {
      Tile tile = random_tile(1, 4, 4, 1, 1);
      tile.row_ids[0] = y ? 0 : 1;
      tile.dots[0] = x;
      const Result result = pass<float>(tile, ElementKind::kFloat32, 4);
      float g;
      std::memcpy(&g, result.grad.data(), sizeof g);
      const std::string what = std::to_string(x) + (y ? " positive" : " negative");
      const float t = y ? -x : x;
      const double wanted = (y ? -kPosWeight : 1) * (t > 0 ? 1.0 : 0.0);
      expect(std::isnan(x) ? std::isnan(g) && std::isnan(result.sums[0]) : g == wanted, what);
      if (!std::isnan(x)) expect(t > 0 ? std::isinf(result.sums[0]) : std::isfinite(result.sums[0]), what + ", loss");
    }
  }
}

void adds_and_refuses() {
  Tile t = random_tile(3, 5, 5, 2, 1);
  const double params[] = {kScale, kBias, kPosWeight};
  std::vector<double> work(exaonepath::sigmoid_workspace_cuda(3, 5));
  std::vector<float> grad(15);
  float* x = t.dots.data();
  const auto call = [&](const float* dots, void* g, ElementKind kind, std::int64_t rows, std::int64_t cols,
                        std::int64_t ld_grad, double* sums, int device = 0) {
    exaonepath::sigmoid_pass_cuda(dots, g, kind, rows, cols, 5, ld_grad, t.row_ids.data(), t.col_ids.data(), params,
                                  work.data(), sums, device, nullptr);
  };
  const auto f32 = ElementKind::kFloat32;
  call(x, grad.data(), f32, 3, 5, 5, t.sums);
  const double loss = t.sums[0];
  call(x, grad.data(), f32, 3, 5, 5, t.sums);
  expect(loss > 0 && t.sums[0] == 2 * loss && t.sums[6] == 0, "adds to the sums");
  call(nullptr, nullptr, f32, 0, 5, 5, nullptr);
  call(nullptr, nullptr, f32, 3, 0, 5, nullptr);
  expect(exaonepath::sigmoid_workspace_cuda(0, 5) == 0, "no workspace for an empty tile");
  refuses("negative rows", [&] { call(x, x, f32, -1, 5, 5, t.sums); });
  refuses("short stride", [&] { call(x, grad.data(), f32, 3, 5, 4, t.sums); });
  refuses("no gradient", [&] { call(x, nullptr, f32, 3, 5, 5, t.sums); });
  refuses("no sums", [&] { call(x, x, f32, 3, 5, 5, nullptr); });
  refuses("half precision in place", [&] { call(x, x, ElementKind::kFloat16, 3, 5, 5, t.sums); });
  refuses("another stride in place", [&] { call(x, x, f32, 3, 5, 6, t.sums); });
  refuses("unknown kind", [&] { call(x, grad.data(), static_cast<ElementKind>(9), 3, 5, 5, t.sums); });
  refuses("too large for a launch", [&] {
    exaonepath::sigmoid_pass_cuda(x, x, f32, std::int64_t{1} << 40, 1, 1, 1, nullptr, nullptr, params, work.data(),
                                  t.sums, 0, nullptr);
  });
  try {
    call(x, grad.data(), f32, 3, 5, 5, t.sums, 7);
    expect(false, "a device that does not exist");
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()) == "cudaSetDevice: invalid device ordinal", "a device that does not exist");
  }
}

}  // namespace

int main() {
  tiles();
  not_finite();
  adds_and_refuses();
  return finish();
}

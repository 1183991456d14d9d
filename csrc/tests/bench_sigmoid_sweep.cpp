// Host time of the sweep a tile, without a card: the very source, where launches, events and products return at once.
// What CUDA and cuBLAS take for a call is not in it.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define EXAONEPATH_NO_DEVICE
#include "cublas.h"
#include "sigmoid_loss_cuda.cu"
#include "sigmoid_sweep_cuda.cpp"

namespace exaonepath {

const Cublas* find_cublas(std::string&) {
  static const Cublas functions{[](auto...) { return 0; },
                                [](void* handle, void** stream) { return *stream = handle, 0; }};
  return &functions;
}
const char* cublas_status_name(int) { return ""; }

}  // namespace exaonepath

// Prints one line of JSON: microseconds a tile, for one stream and for two.
int main() {
  constexpr std::int64_t kSide = 100, kTile = 128, kTiles = kSide * kSide;
  char stream, side_stream;
  double anything[8] = {};
  exaonepath::SigmoidSweep sweep{};
  sweep.u = sweep.v = sweep.gradient_u = sweep.gradient_v = anything;
  sweep.du = sweep.dv = reinterpret_cast<float*>(anything);
  sweep.operand = sweep.gradient_operand = exaonepath::ElementKind::kBfloat16;
  sweep.row_ids = sweep.col_ids = reinterpret_cast<const std::int64_t*>(anything);
  sweep.params = sweep.sums = anything;
  sweep.rows = sweep.cols = kSide * kTile;
  sweep.dim = 256;
  sweep.tile_rows = sweep.tile_cols = kTile;
  sweep.workspace = reinterpret_cast<void*>(std::uintptr_t{256});
  sweep.stream = sweep.blas_handle = &stream;
  double best[2] = {1e9, 1e9};
  for (int round = 0; round < 20; ++round) {
    for (const int streams : {1, 2}) {
      sweep.side_stream = streams == 2 ? &side_stream : nullptr;
      const auto start = std::chrono::steady_clock::now();
      exaonepath::sigmoid_sweep_cuda(sweep);
      const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
      best[streams - 1] = std::min(best[streams - 1], took.count() / kTiles);
    }
  }
  std::printf("{\"us_per_tile\": %.4f, \"us_per_tile_two_streams\": %.4f}\n", best[0], best[1]);
}

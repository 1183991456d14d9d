// The parts of the CUDA pass, for the sweep: what it does once for each tile, and once for all tiles.
#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "sigmoid_loss.h"

namespace exaonepath {

// Restores the caller's current device, also after an error.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// A tile as sigmoid_pass_cuda takes it, on the current device.
struct SigmoidTile {
  const float* dots;
  void* grad;
  ElementKind grad_kind;
  std::int64_t rows, cols, ld_dots, ld_grad;
  const std::int64_t* row_ids;
  const std::int64_t* col_ids;
  const double* params;
};

// `block_sums` holds sigmoid_workspace_cuda(rows, cols) doubles, for the largest tile that is added to it.
// Queues: set them to zero; the pass, where each block adds to its own; their total, added to `sums`.
void clear_block_sums(double* block_sums, std::int64_t count, cudaStream_t stream);
void queue_sigmoid_pass(const SigmoidTile& tile, double* block_sums, cudaStream_t stream);
void queue_sigmoid_sums(const double* block_sums, std::int64_t count, double* sums, cudaStream_t stream);

}  // namespace exaonepath

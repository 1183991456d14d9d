// The sweep over all tiles of a pair: which calls are made for a tile, in which order, on which memory.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "cublas.h"
#include "sigmoid_pass_cuda.h"

namespace exaonepath {
namespace {

constexpr std::int64_t kAlignment = 256;     // of each part of the workspace, in bytes: what cudaMalloc gives
constexpr std::int64_t kStrideElements = 8;  // 16 bytes of bfloat16: what tensor cores and the pass are fastest with
constexpr std::int64_t kProductBlock = 128;  // cuBLAS's kernels work in blocks of 64 to 256 rows or columns

std::int64_t round_up(std::int64_t value, std::int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Length of all pieces but the last, when `total` is cut into as few pieces of at most `largest` as possible: 2,100 in
// pieces of 2,048 are 1,152 and 948, and not 2,048 and 52, which would cost almost as much as 2,048.
std::int64_t piece(std::int64_t total, std::int64_t largest) {
  if (total <= largest) return total;
  return std::min(largest, round_up(ceil_div(total, ceil_div(total, largest)), kProductBlock));
}

// Sizes of the largest tile, and where the parts of the workspace begin.
struct Layout {
  std::int64_t rows, cols, ld;
  int tiles_held;  // by the workspace: 1, or 2 with a side stream
  bool in_place;   // gradients replace the products
  std::int64_t dots_bytes, grad_bytes, block_sums;

  explicit Layout(const SigmoidSweep& sweep) {
    if (sweep.rows < 0 || sweep.cols < 0 || sweep.dim < 0) {
      throw std::invalid_argument("sigmoid sweep: rows, cols and dim must not be negative");
    }
    if (sweep.tile_rows < 1 || sweep.tile_cols < 1) {
      throw std::invalid_argument("sigmoid sweep: tile_rows and tile_cols must be 1 or more");
    }
    rows = piece(sweep.rows, sweep.tile_rows);
    cols = piece(sweep.cols, sweep.tile_cols);
    ld = round_up(cols, kStrideElements);
    // cuBLAS takes 32-bit sizes. The limit keeps all byte counts below far from overflow too.
    if (rows > INT_MAX || ld > INT_MAX || sweep.dim > INT_MAX || rows * ld > std::int64_t{1} << 40) {
      throw std::invalid_argument("sigmoid sweep: the tile is too large; make tile_rows or tile_cols smaller");
    }
    if (sweep.gradient_operand != ElementKind::kFloat32 && sweep.gradient_operand != ElementKind::kBfloat16) {
      throw std::invalid_argument("sigmoid sweep: gradient_operand must be float32 or bfloat16");
    }
    tiles_held = sweep.side_stream ? 2 : 1;
    in_place = sweep.gradient_operand == ElementKind::kFloat32;
    dots_bytes = round_up(rows * ld * 4, kAlignment);
    grad_bytes = in_place ? 0 : round_up(rows * ld * 2, kAlignment);
    block_sums = sigmoid_workspace_cuda(rows, cols);
  }

  std::int64_t bytes() const {
    return tiles_held * (dots_bytes + grad_bytes) + block_sums * static_cast<std::int64_t>(sizeof(double));
  }
};

int cuda_type(ElementKind kind) {
  switch (kind) {
    case ElementKind::kFloat32: return kCudaReal32F;
    case ElementKind::kFloat16: return kCudaReal16F;
    case ElementKind::kBfloat16: return kCudaReal16Bf;
  }
  throw std::invalid_argument("sigmoid sweep: unknown kind of operand");
}

const void* row(const void* matrix, ElementKind kind, std::int64_t index, std::int64_t dim) {
  return static_cast<const char*>(matrix) + index * dim * (kind == ElementKind::kFloat32 ? 4 : 2);
}

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  // CUDA keeps what is still needed of it.
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // What is queued on `later` from now on waits for what is queued on `earlier` up to now.
  void order(cudaStream_t earlier, cudaStream_t later) {
    check(cudaEventRecord(event_, earlier), "cudaEventRecord");
    check(cudaStreamWaitEvent(later, event_, 0), "cudaStreamWaitEvent");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// A matrix as cuBLAS sees it. A row-major matrix is, to cuBLAS, its column-major transpose.
struct Operand {
  const void* data;
  int type;
  int ld;
  int op;
};

class Sweep {
 public:
  Sweep(const SigmoidSweep& sweep, const Layout& layout, const Cublas& cublas)
      : s_(sweep),
        layout_(layout),
        cublas_(cublas),
        stream_(static_cast<cudaStream_t>(sweep.stream)),
        pass_stream_(static_cast<cudaStream_t>(sweep.side_stream ? sweep.side_stream : sweep.stream)),
        tiles_down_(ceil_div(sweep.rows, layout.rows)),
        tiles_(tiles_down_ * ceil_div(sweep.cols, layout.cols)) {
    char* memory = static_cast<char*>(sweep.workspace);
    for (int i = 0; i < layout.tiles_held; ++i) {
      dots_[i] = reinterpret_cast<float*>(memory);
      memory += layout.dots_bytes;
      grad_[i] = layout.in_place ? dots_[i] : static_cast<void*>(memory);
      memory += layout.grad_bytes;
    }
    block_sums_ = reinterpret_cast<double*>(memory);
  }

  void run() {
    clear_block_sums(block_sums_, layout_.block_sums, stream_);
    if (pass_stream_ == stream_) {
      for (std::int64_t i = 0; i < tiles_; ++i) {
        const Part part = part_of(i);
        dots(part, 0);
        pass(part, 0);
        gradients(part, 0);
      }
    } else {
      run_overlapped();
    }
    queue_sigmoid_sums(block_sums_, layout_.block_sums, s_.sums, stream_);
  }

 private:
  struct Part {
    std::int64_t row, rows, col, cols;
  };

  // Down the rows first: one block of V and of dV stays in the cache for a whole column of tiles.
  Part part_of(std::int64_t tile) const {
    const std::int64_t r = tile % tiles_down_ * layout_.rows, c = tile / tiles_down_ * layout_.cols;
    return {r, std::min(layout_.rows, s_.rows - r), c, std::min(layout_.cols, s_.cols - c)};
  }

  // All products stay on one stream, so cuBLAS gives the same bits as without a side stream. The pass of tile i + 1
  // runs at the same time as the gradients of tile i. Product i + 1 writes to the memory of tile i - 1: it is queued
  // behind the gradients of that tile, the last that read it, and they behind its pass.
  void run_overlapped() {
    Event product_done, pass_done;
    dots(part_of(0), 0);
    product_done.order(stream_, pass_stream_);
    pass(part_of(0), 0);
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const int held = static_cast<int>(i % 2);
      const bool more = i + 1 < tiles_;
      if (more) dots(part_of(i + 1), 1 - held);
      pass_done.order(pass_stream_, stream_);
      if (more) {
        product_done.order(stream_, pass_stream_);
        pass(part_of(i + 1), 1 - held);
      }
      gradients(part_of(i), held);
    }
  }

  // dots = U[r] V[c]^T; column-major: dots^T [cols, rows] = V U^T
  void dots(const Part& part, int held) const {
    const int type = cuda_type(s_.operand), dim = static_cast<int>(s_.dim), ld = static_cast<int>(layout_.ld);
    product("U V^T", static_cast<int>(part.cols), static_cast<int>(part.rows), dim,
            {row(s_.v, s_.operand, part.col, s_.dim), type, dim, kCublasOpT},
            {row(s_.u, s_.operand, part.row, s_.dim), type, dim, kCublasOpN}, 0.0f, dots_[held], ld);
  }

  void pass(const Part& part, int held) const {
    queue_sigmoid_pass({dots_[held], grad_[held], s_.gradient_operand, part.rows, part.cols, layout_.ld, layout_.ld,
                        s_.row_ids + part.row, s_.col_ids + part.col, s_.params},
                       block_sums_, pass_stream_);
  }

  // dU[r] += G V[c], dV[c] += G^T U[r]; column-major: dU^T [dim, rows] += V^T G^T, dV^T [dim, cols] += U^T G
  void gradients(const Part& part, int held) const {
    if (!s_.du) return;
    const ElementKind kind = s_.gradient_operand;
    const int type = cuda_type(kind), dim = static_cast<int>(s_.dim), ld = static_cast<int>(layout_.ld);
    const int rows = static_cast<int>(part.rows), cols = static_cast<int>(part.cols);
    product("G V", dim, rows, cols, {row(s_.gradient_v, kind, part.col, s_.dim), type, dim, kCublasOpN},
            {grad_[held], type, ld, kCublasOpN}, 1.0f, s_.du + part.row * s_.dim, dim);
    product("G^T U", dim, cols, rows, {row(s_.gradient_u, kind, part.row, s_.dim), type, dim, kCublasOpN},
            {grad_[held], type, ld, kCublasOpT}, 1.0f, s_.dv + part.col * s_.dim, dim);
  }

  // C [m, n] = op(A) [m, k] op(B) [k, n] + beta C in float32, column-major.
  void product(const char* name, int m, int n, int k, const Operand& a, const Operand& b, float beta, float* c,
               int ld) const {
    const float one = 1.0f;
    const int status = cublas_.gemm_ex(s_.blas_handle, a.op, b.op, m, n, k, &one, a.data, a.type, a.ld, b.data, b.type,
                                       b.ld, &beta, c, kCudaReal32F, ld, kCublasCompute32F, kCublasGemmDefault);
    if (status == kCublasSuccess) return;
    throw std::runtime_error("sigmoid sweep: cublasGemmEx for " + std::string(name) + " [" + std::to_string(m) + ", " +
                             std::to_string(n) + ", " + std::to_string(k) + "]: " + cublas_status_name(status));
  }

  const SigmoidSweep& s_;
  const Layout& layout_;
  const Cublas& cublas_;
  cudaStream_t stream_, pass_stream_;
  std::int64_t tiles_down_, tiles_;
  float* dots_[2] = {};
  void* grad_[2] = {};
  double* block_sums_;
};

}  // namespace

std::int64_t sigmoid_sweep_workspace_cuda(const SigmoidSweep& sweep) { return Layout(sweep).bytes(); }

void sigmoid_sweep_cuda(const SigmoidSweep& sweep) {
  const Layout layout(sweep);
  if (sweep.rows == 0 || sweep.cols == 0) return;
  if (sweep.dim == 0) throw std::invalid_argument("sigmoid sweep: dim must be 1 or more");
  if (!sweep.u || !sweep.v || !sweep.row_ids || !sweep.col_ids || !sweep.params || !sweep.sums || !sweep.workspace ||
      !sweep.blas_handle) {
    throw std::invalid_argument("sigmoid sweep: null pointer");
  }
  if (!sweep.du != !sweep.dv || (sweep.du && (!sweep.gradient_u || !sweep.gradient_v))) {
    throw std::invalid_argument("sigmoid sweep: du and dv belong together, and need gradient_u and gradient_v");
  }
  if (reinterpret_cast<std::uintptr_t>(sweep.workspace) % kAlignment != 0) {
    throw std::invalid_argument("sigmoid sweep: workspace must be at a multiple of 256 bytes");
  }
  cuda_type(sweep.operand);
  std::string reason;
  const Cublas* cublas = find_cublas(reason);
  if (!cublas) throw std::runtime_error("sigmoid sweep: " + reason);
  const CurrentDevice current(sweep.device);
  void* stream = nullptr;
  const int status = cublas->get_stream(sweep.blas_handle, &stream);
  if (status != kCublasSuccess) {
    throw std::runtime_error("sigmoid sweep: cublasGetStream: " + std::string(cublas_status_name(status)));
  }
  if (stream != sweep.stream) throw std::invalid_argument("sigmoid sweep: the cuBLAS handle is of another stream");
  Sweep(sweep, layout, *cublas).run();
}

}  // namespace exaonepath

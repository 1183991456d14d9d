// The pass on a GPU. One block takes kRows x kCols elements: each thread keeps the ids of its few columns in registers
// and goes down the rows, so that an element costs its own bytes, two special-function operations and some thirty
// others. Sums go thread, warp (float32), block, all tiles of a block, all blocks (float64), in an order fixed by the
// shape.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstring>
#include <stdexcept>

#include "sigmoid_pass_cuda.h"

namespace exaonepath {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColsPerThread = 4;
constexpr int kCols = kThreads * kColsPerThread;
constexpr int kRows = 8;
constexpr int kRowsAtOnce = 4;  // their loads are all under way before the first is used
constexpr int kUsedSums = 6;

struct Tile {
  const float* dots;            // [rows, cols], row stride ld_dots
  const std::int64_t* row_ids;  // [rows]
  const std::int64_t* col_ids;  // [cols]
  const double* params;         // [3]
  double* block_sums;           // [blocks, kUsedSums], added to
  std::int64_t rows, cols, ld_dots, ld_grad;
  std::int64_t blocks, blocks_across;
};

struct Sums {
  float value[kUsedSums];  // in the order of sigmoid_loss.h
};

// 1 / x and 2^x of the special-function unit, without the extra code for subnormal numbers.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// softplus(t) and sigmoid(t). fmaxf drops a NaN, log1p brings it back.
__device__ __forceinline__ void activation(float t, float& softplus, float& sigmoid) {
  const float z = power_of_two(fabsf(t) * -1.44269504f);
  // log1p(z) = z + z^2 P(z) on [0, 1]: minimax, 5.1e-9 relative. log(1 + z) would lose the small z, which are most.
  float p = -0.003318472238f;
  p = fmaf(p, z, 0.0202045814f);
  p = fmaf(p, z, -0.05766443309f);
  p = fmaf(p, z, 0.1068055387f);
  p = fmaf(p, z, -0.1535539498f);
  p = fmaf(p, z, 0.1969539994f);
  p = fmaf(p, z, -0.2495858727f);
  p = fmaf(p, z, 0.333305113f);
  p = fmaf(p, z, -0.4999993276f);
  softplus = fmaxf(t, 0.0f) + fmaf(p * z, z, z);
  sigmoid = (t < 0.0f ? z : 1.0f) * reciprocal(1.0f + z);
}

struct Loss {
  float scale, bias, pos_weight;

  // g of one element; its terms go into the sums.
  template <bool kMayBePositive>
  __device__ __forceinline__ float element(float dot, bool positive, Sums& sums) const {
    const bool y = kMayBePositive && positive;
    const float s = fmaf(dot, scale, bias);
    float softplus, sigmoid;
    activation(y ? -s : s, softplus, sigmoid);
    if (y) {
      softplus *= pos_weight;
      sigmoid *= -pos_weight;
      sums.value[3] += 1.0f;
      sums.value[4] += s;
    } else {
      sums.value[5] += s;
    }
    sums.value[0] += softplus;
    sums.value[1] += sigmoid;
    sums.value[2] = fmaf(sigmoid, dot, sums.value[2]);
    return sigmoid;
  }
};

__device__ __forceinline__ void store(float* p, float g) { *p = g; }
__device__ __forceinline__ void store(__half* p, float g) { *p = __float2half_rn(g); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float g) { *p = __float2bfloat16_rn(g); }

template <typename Pair>
__device__ __forceinline__ uint2 bits_of(const Pair (&pairs)[2]) {
  uint2 bits;
  static_assert(sizeof pairs == sizeof bits, "four halves");
  memcpy(&bits, pairs, sizeof bits);
  return bits;
}
__device__ __forceinline__ void store4(float* p, const float4& g) { *reinterpret_cast<float4*>(p) = g; }
__device__ __forceinline__ void store4(__half* p, const float4& g) {
  const __half2 pairs[2] = {__floats2half2_rn(g.x, g.y), __floats2half2_rn(g.z, g.w)};
  *reinterpret_cast<uint2*>(p) = bits_of(pairs);
}
__device__ __forceinline__ void store4(__nv_bfloat16* p, const float4& g) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(g.x, g.y), __floats2bfloat162_rn(g.z, g.w)};
  *reinterpret_cast<uint2*>(p) = bits_of(pairs);
}

// A thread's four neighbouring columns, all inside the tile, down the block's rows.
template <typename Grad>
__device__ __forceinline__ void quads(const Tile& tile, Grad* grad, const std::int64_t* row_ids, int rows,
                                      std::int64_t k0, std::int64_t l, const Loss& loss, Sums& sums) {
  std::int64_t ids[kColsPerThread];
#pragma unroll
  for (int i = 0; i < kColsPerThread; ++i) ids[i] = tile.col_ids[l + i];
  const float* from = tile.dots + k0 * tile.ld_dots + l;
  Grad* to = grad + k0 * tile.ld_grad + l;
  for (int k = 0; k < rows; k += kRowsAtOnce) {
    float4 dots[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (k + i < rows) dots[i] = *reinterpret_cast<const float4*>(from + i * tile.ld_dots);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (k + i >= rows) break;
      const std::int64_t id = row_ids[k + i];
      const bool y[4] = {id == ids[0], id == ids[1], id == ids[2], id == ids[3]};
      float4 g;
      // Few pairs are positives, and few warps take the second branch.
      if (!(y[0] || y[1] || y[2] || y[3])) {
        g.x = loss.element<false>(dots[i].x, false, sums);
        g.y = loss.element<false>(dots[i].y, false, sums);
        g.z = loss.element<false>(dots[i].z, false, sums);
        g.w = loss.element<false>(dots[i].w, false, sums);
      } else {
        g.x = loss.element<true>(dots[i].x, y[0], sums);
        g.y = loss.element<true>(dots[i].y, y[1], sums);
        g.z = loss.element<true>(dots[i].z, y[2], sums);
        g.w = loss.element<true>(dots[i].w, y[3], sums);
      }
      store4(to + i * tile.ld_grad, g);
    }
    from += kRowsAtOnce * tile.ld_dots;
    to += kRowsAtOnce * tile.ld_grad;
  }
}

// A thread's columns one by one, a block's width apart, so that those of a warp lie side by side: for what is not
// aligned, and for the last columns of a tile.
template <typename Grad>
__device__ __forceinline__ void singles(const Tile& tile, Grad* grad, const std::int64_t* row_ids, int rows,
                                        std::int64_t k0, std::int64_t l0, std::int64_t l1, const Loss& loss,
                                        Sums& sums) {
  for (std::int64_t l = l0 + threadIdx.x; l < l1; l += kThreads) {
    const std::int64_t id = tile.col_ids[l];
    for (int k = 0; k < rows; ++k) {
      const float dot = tile.dots[(k0 + k) * tile.ld_dots + l];
      store(grad + (k0 + k) * tile.ld_grad + l, loss.element<true>(dot, row_ids[k] == id, sums));
    }
  }
}

template <typename Grad, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) sigmoid_pass_kernel(Tile tile, Grad* grad) {
  __shared__ float params[3];
  __shared__ std::int64_t row_ids[kRows];
  __shared__ float warp_sums[kUsedSums][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t k0 = blockIdx.x / tile.blocks_across * kRows;
  const std::int64_t l0 = blockIdx.x % tile.blocks_across * kCols;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(kRows), tile.rows - k0));
  const std::int64_t l1 = min(l0 + kCols, tile.cols);
  // Converted once a block: float64 is slow on most cards.
  if (thread < 3) params[thread] = static_cast<float>(tile.params[thread]);
  if (thread < rows) row_ids[thread] = tile.row_ids[k0 + thread];
  __syncthreads();
  const Loss loss{params[0], params[1], params[2]};

  Sums sums{};
  if (kAligned) {
    const std::int64_t l = l0 + thread * kColsPerThread;
    const std::int64_t whole = l0 + (l1 - l0) / kColsPerThread * kColsPerThread;
    if (l < whole) quads(tile, grad, row_ids, rows, k0, l, loss, sums);
    singles(tile, grad, row_ids, rows, k0, whole, l1, loss, sums);
  } else {
    singles(tile, grad, row_ids, rows, k0, l0, l1, loss, sums);
  }

#pragma unroll
  for (int i = 0; i < kUsedSums; ++i) {
    float sum = sums.value[i];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lane);
    if (thread % 32 == 0) warp_sums[i][thread / 32] = sum;
  }
  __syncthreads();
  if (thread < kUsedSums) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[thread][warp];
    // Added to those of the tiles before, which are complete: no other block has this entry. So one launch at the end
    // adds up a sweep, in place of one for each tile.
    tile.block_sums[blockIdx.x * kUsedSums + thread] += sum;
  }
}

// One block for each of the sums; adds the total over the blocks of the pass to the stored sum.
__global__ void __launch_bounds__(kThreads) sigmoid_sums_kernel(const double* block_sums, std::int64_t blocks,
                                                                double* sums) {
  __shared__ double partial[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (std::int64_t i = thread; i < blocks; i += kThreads) sum += block_sums[i * kUsedSums + blockIdx.x];
  partial[thread] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) sums[blockIdx.x] += partial[0];
}

template <typename Grad>
void launch(const Tile& tile, void* grad, cudaStream_t stream) {
  constexpr std::size_t store_bytes = kColsPerThread * sizeof(Grad);
  const bool aligned = reinterpret_cast<std::uintptr_t>(tile.dots) % sizeof(float4) == 0 &&
                       reinterpret_cast<std::uintptr_t>(grad) % store_bytes == 0 &&
                       tile.ld_dots % kColsPerThread == 0 && tile.ld_grad % kColsPerThread == 0;
  Grad* typed = static_cast<Grad*>(grad);
  void* arguments[] = {const_cast<Tile*>(&tile), &typed};
  check(cudaLaunchKernel(aligned ? sigmoid_pass_kernel<Grad, true> : sigmoid_pass_kernel<Grad, false>,
                         dim3(static_cast<unsigned>(tile.blocks)), dim3(kThreads), arguments, 0, stream),
        "sigmoid pass: launch");
}

}  // namespace

std::int64_t sigmoid_workspace_cuda(std::int64_t rows, std::int64_t cols) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("sigmoid pass: rows and cols must not be negative");
  return kUsedSums * ceil_div(rows, kRows) * ceil_div(cols, kCols);
}

void clear_block_sums(double* block_sums, std::int64_t count, cudaStream_t stream) {
  check(cudaMemsetAsync(block_sums, 0, static_cast<std::size_t>(count) * sizeof(double), stream), "cudaMemsetAsync");
}

void queue_sigmoid_pass(const SigmoidTile& t, double* block_sums, cudaStream_t stream) {
  const std::int64_t blocks = sigmoid_workspace_cuda(t.rows, t.cols) / kUsedSums;
  if (blocks > INT_MAX) throw std::invalid_argument("sigmoid pass: the tile is too large for one launch; split it");
  const Tile tile{t.dots, t.row_ids, t.col_ids, t.params,  block_sums, t.rows,
                  t.cols, t.ld_dots, t.ld_grad, blocks,    ceil_div(t.cols, kCols)};
  switch (t.grad_kind) {
    case ElementKind::kFloat32: launch<float>(tile, t.grad, stream); break;
    case ElementKind::kFloat16: launch<__half>(tile, t.grad, stream); break;
    case ElementKind::kBfloat16: launch<__nv_bfloat16>(tile, t.grad, stream); break;
    default: throw std::invalid_argument("sigmoid pass: unknown kind of gradient");
  }
}

void queue_sigmoid_sums(const double* block_sums, std::int64_t count, double* sums, cudaStream_t stream) {
  std::int64_t blocks = count / kUsedSums;
  void* arguments[] = {&block_sums, &blocks, &sums};
  check(cudaLaunchKernel(sigmoid_sums_kernel, dim3(kUsedSums), dim3(kThreads), arguments, 0, stream),
        "sigmoid pass: launch of the sums");
}

void sigmoid_pass_cuda(const float* dots, void* grad, ElementKind grad_kind, std::int64_t rows, std::int64_t cols,
                       std::int64_t ld_dots, std::int64_t ld_grad, const std::int64_t* row_ids,
                       const std::int64_t* col_ids, const double* params, double* workspace, double* sums, int device,
                       void* stream) {
  const std::int64_t count = sigmoid_workspace_cuda(rows, cols);
  if (ld_dots < cols || ld_grad < cols) {
    throw std::invalid_argument("sigmoid pass: a row stride is smaller than a row");
  }
  if (count == 0) return;
  if (!dots || !grad || !row_ids || !col_ids || !params || !workspace || !sums) {
    throw std::invalid_argument("sigmoid pass: null pointer");
  }
  if (grad == dots && (grad_kind != ElementKind::kFloat32 || ld_grad != ld_dots)) {
    throw std::invalid_argument("sigmoid pass: only float32 gradients of the same row stride may replace the products");
  }
  if (count / kUsedSums > INT_MAX) {
    throw std::invalid_argument("sigmoid pass: the tile is too large for one launch; split it");
  }
  const CurrentDevice current(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  clear_block_sums(workspace, count, queue);
  queue_sigmoid_pass({dots, grad, grad_kind, rows, cols, ld_dots, ld_grad, row_ids, col_ids, params}, workspace, queue);
  queue_sigmoid_sums(workspace, count, sums, queue);
}

}  // namespace exaonepath

// The pass on a GPU. One block takes kRows x kCols elements: each thread keeps what it needs of its few columns in
// registers and goes down the rows, so that an element costs its own bytes, 2.25 special-function operations and some
// twenty-five others. Sums go thread, warp (float32), block, all tiles of a block, all blocks (float64), in an order
// fixed by the shape.
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
constexpr int kRows = 16;  // with fewer the sums at the end of a block cost too much, with more there are few blocks
constexpr int kRowsAtOnce = 4;  // their loads are all under way before the first is used
constexpr int kUsedSums = 6;

struct Tile {
  const float* dots;            // [rows, cols], row stride ld_dots
  const std::int64_t* row_ids;  // [rows]
  const std::int64_t* col_ids;  // [cols]
  const double* params;         // [3]
  double* block_sums;           // [blocks, kUsedSums], added to
  std::int64_t rows, cols, ld_dots, ld_grad;
  unsigned blocks, blocks_across;  // 32 bits: a division of 64 is a function call
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

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log1p(z) for z in [0, 1] = z + z^2 P(z): minimax, 5.1e-9 relative. log(1 + z) would lose the small z, which are most.
__device__ __forceinline__ float log1p_of_fraction(float z) {
  float p = -0.003318472238f;
  p = fmaf(p, z, 0.0202045814f);
  p = fmaf(p, z, -0.05766443309f);
  p = fmaf(p, z, 0.1068055387f);
  p = fmaf(p, z, -0.1535539498f);
  p = fmaf(p, z, 0.1969539994f);
  p = fmaf(p, z, -0.2495858727f);
  p = fmaf(p, z, 0.333305113f);
  p = fmaf(p, z, -0.4999993276f);
  return fmaf(p * z, z, z);
}

// exp(-|t|), from which both functions follow.
__device__ __forceinline__ float exp_of_minus_abs(float t) { return power_of_two(fabsf(t) * -1.44269504f); }
__device__ __forceinline__ float sigmoid_of(float t, float z) {
  return (t < 0.0f ? z : 1.0f) * reciprocal(1.0f + z);
}
// fmaxf drops a NaN, log1p brings it back.
__device__ __forceinline__ float softplus_of(float t, float z) { return fmaxf(t, 0.0f) + log1p_of_fraction(z); }

struct Loss {
  float scale, bias, pos_weight;

  // g of one element of any kind; its terms go into the sums.
  __device__ __forceinline__ float element(float dot, bool positive, Sums& sums) const {
    const float s = fmaf(dot, scale, bias);
    const float t = positive ? -s : s;
    const float z = exp_of_minus_abs(t);
    float softplus = softplus_of(t, z), g = sigmoid_of(t, z);
    if (positive) {
      softplus *= pos_weight;
      g *= -pos_weight;
      sums.value[3] += 1.0f;
      sums.value[4] += s;
    } else {
      sums.value[5] += s;
    }
    sums.value[0] += softplus;
    sums.value[1] += g;
    sums.value[2] = fmaf(g, dot, sums.value[2]);
    return g;
  }

  // g of four negatives. The logarithm is taken once, of the product of all (1 + z): sum log1p(z) = log1p(p), where p
  // grows by p z + z and loses nothing of small z. The sums take the four together, so they add few numbers in float32.
  __device__ __forceinline__ float4 negatives(const float4& dots, Sums& sums) const {
    const float dot[4] = {dots.x, dots.y, dots.z, dots.w};
    float g[4], p, linear, sum_g, sum_g_dot, sum_s;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float s = fmaf(dot[i], scale, bias);
      const float z = exp_of_minus_abs(s);
      g[i] = sigmoid_of(s, z);
      // Not from zero: the compiler may not leave out an addition of it.
      p = i == 0 ? z : p + fmaf(p, z, z);
      linear = i == 0 ? fmaxf(s, 0.0f) : linear + fmaxf(s, 0.0f);
      sum_g = i == 0 ? g[i] : sum_g + g[i];
      sum_g_dot = i == 0 ? g[i] * dot[i] : fmaf(g[i], dot[i], sum_g_dot);
      sum_s = i == 0 ? s : sum_s + s;
    }
    // p is in [0, 15]; beyond 1 the logarithm of 1 + p has no small values to lose. A NaN stays one either way.
    const float logarithm = p > 1.0f ? log2_of(1.0f + p) * 0.693147181f : log1p_of_fraction(p);
    sums.value[0] += linear + logarithm;
    sums.value[1] += sum_g;
    sums.value[2] += sum_g_dot;
    sums.value[5] += sum_s;
    return {g[0], g[1], g[2], g[3]};
  }
};

// Equal ids have equal keys; other ids rarely do. Half the comparisons of an id.
__device__ __forceinline__ unsigned key_of(std::int64_t id) {
  return static_cast<unsigned>(id) ^ static_cast<unsigned>(static_cast<std::uint64_t>(id) >> 32) * 0x9e3779b9u;
}

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
__device__ __forceinline__ void quads(const Tile& tile, Grad* grad, const std::int64_t* row_ids,
                                      const unsigned* row_keys, int rows, std::int64_t k0, std::int64_t l,
                                      const Loss& loss, Sums& sums) {
  const std::int64_t* ids = tile.col_ids + l;
  const unsigned keys[kColsPerThread] = {key_of(ids[0]), key_of(ids[1]), key_of(ids[2]), key_of(ids[3])};
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
      const unsigned key = row_keys[k + i];
      float4 g;
      // Few pairs are positives, and few warps take the second branch.
      if (key != keys[0] && key != keys[1] && key != keys[2] && key != keys[3]) {
        g = loss.negatives(dots[i], sums);
      } else {
        const std::int64_t id = row_ids[k + i];
        g.x = loss.element(dots[i].x, id == ids[0], sums);
        g.y = loss.element(dots[i].y, id == ids[1], sums);
        g.z = loss.element(dots[i].z, id == ids[2], sums);
        g.w = loss.element(dots[i].w, id == ids[3], sums);
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
      store(grad + (k0 + k) * tile.ld_grad + l, loss.element(dot, row_ids[k] == id, sums));
    }
  }
}

template <typename Grad, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) sigmoid_pass_kernel(Tile tile, Grad* grad) {
  __shared__ float params[3];
  __shared__ std::int64_t row_ids[kRows];
  __shared__ unsigned row_keys[kRows];
  __shared__ float warp_sums[kUsedSums][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t k0 = static_cast<std::int64_t>(blockIdx.x / tile.blocks_across) * kRows;
  const std::int64_t l0 = static_cast<std::int64_t>(blockIdx.x % tile.blocks_across) * kCols;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(kRows), tile.rows - k0));
  const std::int64_t l1 = min(l0 + kCols, tile.cols);
  // Converted once a block: float64 is slow on most cards.
  if (thread < 3) params[thread] = static_cast<float>(tile.params[thread]);
  if (thread < rows) {
    row_ids[thread] = tile.row_ids[k0 + thread];
    row_keys[thread] = key_of(row_ids[thread]);
  }
  __syncthreads();
  const Loss loss{params[0], params[1], params[2]};

  Sums sums{};
  if (kAligned) {
    const std::int64_t l = l0 + thread * kColsPerThread;
    const std::int64_t whole = l0 + (l1 - l0) / kColsPerThread * kColsPerThread;
    if (l < whole) quads(tile, grad, row_ids, row_keys, rows, k0, l, loss, sums);
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
    tile.block_sums[static_cast<std::int64_t>(blockIdx.x) * kUsedSums + thread] += sum;
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
                         dim3(tile.blocks), dim3(kThreads), arguments, 0, stream),
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
  const Tile tile{t.dots,
                  t.row_ids,
                  t.col_ids,
                  t.params,
                  block_sums,
                  t.rows,
                  t.cols,
                  t.ld_dots,
                  t.ld_grad,
                  static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(t.cols, kCols))};
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

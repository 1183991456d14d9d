// The two functions of cuBLAS that the sweep calls, on the CPU: the column-major convention of the documentation,
// checked sizes, operands of float32, float16 and bfloat16, products in double.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <vector>

#include "cublas.h"
#include "emulated_blas.h"

namespace {

constexpr int kMagic = 0x626c6173, kNotInitialized = 1, kInvalidValue = 7, kNotSupported = 15;

double element(const void* data, int type, std::int64_t index) {
  if (type == exaonepath::kCudaReal32F) return static_cast<const float*>(data)[index];
  if (type == exaonepath::kCudaReal16F) return value_of(static_cast<const __half*>(data)[index]);
  return value_of(static_cast<const __nv_bfloat16*>(data)[index]);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int cublasGetStream_v2(void* handle, void** stream) {
  const auto* blas = static_cast<EmulatedBlas*>(handle);
  if (!blas || blas->magic != kMagic) return kNotInitialized;
  *stream = blas->stream;
  return 0;
}

EXPORTED int cublasGemmEx(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                          int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c,
                          int c_type, int ldc, int compute_type, int) {
  using namespace exaonepath;
  const auto* blas = static_cast<EmulatedBlas*>(handle);
  if (!blas || blas->magic != kMagic) return kNotInitialized;
  const int a_rows = trans_a == kCublasOpN ? m : k, b_rows = trans_b == kCublasOpN ? k : n;
  if (m < 0 || n < 0 || k < 0 || lda < a_rows || ldb < b_rows || ldc < m || a_rows < 1 || b_rows < 1) {
    return kInvalidValue;
  }
  if (a_type != b_type || c_type != kCudaReal32F || compute_type != kCublasCompute32F) return kNotSupported;
  // Host scalars are read by the call, not by the work it queues.
  const double scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  blas->queue(blas->stream, [=] {
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < m; ++i) {
        double sum = 0;
        for (int l = 0; l < k; ++l) {
          const std::int64_t at_a = trans_a == kCublasOpN ? i + std::int64_t{l} * lda : l + std::int64_t{i} * lda;
          const std::int64_t at_b = trans_b == kCublasOpN ? l + std::int64_t{j} * ldb : j + std::int64_t{l} * ldb;
          sum += element(a, a_type, at_a) * element(b, b_type, at_b);
        }
        float& out = static_cast<float*>(c)[i + std::int64_t{j} * ldc];
        // With beta = 0 the old content is not read: it may be NaN.
        out = static_cast<float>(scale * sum + (keep == 0 ? 0 : keep * out));
      }
    }
  });
  return 0;
}

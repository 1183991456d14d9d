// The two functions of cuBLAS that the sweep calls, found at run time in the library that torch has loaded.
//
// The extension is not linked with cuBLAS: it works with any major version that torch brings, it cannot load a second
// copy, and a handle that torch made belongs to exactly the library that is called. What is declared here is the
// documented C interface of cuBLAS 11 to 13, whose values and signatures NVIDIA keeps.
#pragma once

#include <string>

namespace exaonepath {

struct Cublas {
  // cublasGemmEx. Column-major: C [m, n] = alpha op(A) [m, k] op(B) [k, n] + beta C. Enumerations are passed as int.
  int (*gemm_ex)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                 int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                 int ldc, int compute_type, int algorithm);
  // cublasGetStream_v2
  int (*get_stream)(void* handle, void** stream);
};

constexpr int kCublasOpN = 0, kCublasOpT = 1;                                // cublasOperation_t
constexpr int kCudaReal32F = 0, kCudaReal16F = 2, kCudaReal16Bf = 14;        // cudaDataType_t
constexpr int kCublasCompute32F = 68;                                        // cublasComputeType_t
constexpr int kCublasGemmDefault = -1;                                       // cublasGemmAlgo_t
constexpr int kCublasSuccess = 0;                                            // cublasStatus_t

// The functions; if this process has not loaded cuBLAS, null, and `reason` says so.
const Cublas* find_cublas(std::string& reason);

// Name of a cublasStatus_t, as in the documentation.
const char* cublas_status_name(int status);

}  // namespace exaonepath

#include "cublas.h"

#include <dlfcn.h>

#include <mutex>

namespace exaonepath {
namespace {

// Libraries that may be loaded already: torch's CUDA half first, since a search in it includes the cuBLAS that it was
// linked with, even if another package has loaded a different one.
constexpr const char* kLibraries[] = {"libtorch_cuda.so", "libcublas.so.13", "libcublas.so.12", "libcublas.so.11"};

bool load(Cublas& functions) {
  for (const char* name : kLibraries) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) continue;
    void* gemm_ex = dlsym(library, "cublasGemmEx");
    void* get_stream = dlsym(library, "cublasGetStream_v2");
    // The library is not closed: its functions are used from now on.
    if (gemm_ex && get_stream) {
      functions.gemm_ex = reinterpret_cast<decltype(functions.gemm_ex)>(gemm_ex);
      functions.get_stream = reinterpret_cast<decltype(functions.get_stream)>(get_stream);
      return true;
    }
    dlclose(library);
  }
  return false;
}

}  // namespace

const Cublas* find_cublas(std::string& reason) {
  // A success is kept; after a failure the next call searches again, since torch may be imported later.
  static Cublas functions{};
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (functions.gemm_ex || load(functions)) return &functions;
  reason = "cuBLAS is not loaded in this process: neither libtorch_cuda.so nor libcublas.so.11 to 13 has its functions";
  return nullptr;
}

const char* cublas_status_name(int status) {
  switch (status) {
    case 0: return "CUBLAS_STATUS_SUCCESS";
    case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7: return "CUBLAS_STATUS_INVALID_VALUE";
    case 8: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case 11: return "CUBLAS_STATUS_MAPPING_ERROR";
    case 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case 14: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case 15: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case 16: return "CUBLAS_STATUS_LICENSE_ERROR";
    default: return "unknown cuBLAS status";
  }
}

}  // namespace exaonepath

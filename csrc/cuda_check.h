// Turns a failed CUDA call into an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace exaonepath {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

}  // namespace exaonepath

// As much of CUDA as csrc/*.cu use, on the CPU: the kernels' arithmetic and indices are tested where no card is.
// Blocks run one after the other; the threads of a block are contexts that take turns, each up to its next meeting
// point (__syncthreads, a shuffle), so that one round of turns is one meeting. Kernels that meet in branches are not
// served.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulation {

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline const std::function<void()>* body;
inline std::vector<float> exchanged;

inline void meet() {
  const unsigned self = threadIdx.x;
  swapcontext(&threads[self].context, &scheduler);
  threadIdx.x = self;
}

inline void start() {
  const unsigned self = threadIdx.x;
  (*body)();
  threads[self].done = true;
}

inline void run_block(unsigned count) {
  constexpr std::size_t kStack = 128 * 1024;
  exchanged.assign(count, 0);
  threads.resize(count);
  for (Thread& thread : threads) {
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
      running = true;
    }
  }
}

// The two instructions of the special-function unit in use, by their text.
inline float ptx(const char* text, float x) { return std::strstr(text, "rcp.") ? 1.0f / x : std::exp2(x); }

}  // namespace emulation

// In both places asm reads x and writes y.
#define asm(...) y = emulation::ptx(#__VA_ARGS__, x)

inline void __syncthreads() { emulation::meet(); }
inline float __shfl_down_sync(unsigned, float value, unsigned distance) {
  const unsigned self = threadIdx.x;
  emulation::exchanged[self] = value;
  emulation::meet();
  const float other = self % 32 + distance < 32 ? emulation::exchanged[self + distance] : value;
  emulation::meet();
  return other;
}

template <typename... Parameters, std::size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...);
}
template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  const std::function<void()> body = [&] { call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
  emulation::body = &body;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx.x = i;
    emulation::run_block(block.x);
  }
  emulation::body = nullptr;
  return cudaSuccess;
}

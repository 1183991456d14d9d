// As much of CUDA as csrc/*.cu use, on the CPU: the kernels' arithmetic and indices are tested where no card is.
// Blocks run one after the other; the threads of a block are contexts that take turns, each up to its next meeting
// point (__syncthreads, a shuffle), so that one round of turns is one meeting. Kernels that meet in branches are not
// served.
// Streams are queues: work runs when it is queued, or later (`emulation::schedule`) in an order that is as unkind as
// streams and events allow, so that a missing event shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
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

namespace emulation {

enum class Schedule {
  kAtOnce,          // each operation when it is queued
  kFirstStream,     // at the end: as much as possible of the stream with the lowest address, then of the next
  kLastStream,      // the same from the other end
};
inline Schedule schedule = Schedule::kAtOnce;

struct Operation {
  std::function<void()> work;
  std::shared_ptr<bool> waits_for;  // an event's record that has to be done before
};
inline std::map<void*, std::deque<Operation>> streams;

inline void queue(void* stream, std::function<void()> work, std::shared_ptr<bool> waits_for = nullptr) {
#ifdef EXAONEPATH_NO_DEVICE
  // For host time: whatever is queued is done at once, by nobody.
  return;
#endif
  if (schedule == Schedule::kAtOnce) return work();
  streams[stream].push_back({std::move(work), std::move(waits_for)});
}

// Runs the first operation of a stream, if nothing keeps it from running.
inline bool advance(std::deque<Operation>& stream) {
  if (stream.empty() || (stream.front().waits_for && !*stream.front().waits_for)) return false;
  const Operation operation = std::move(stream.front());
  stream.pop_front();
  operation.work();
  return true;
}

// Runs everything that is queued. After each operation the preferred stream is tried first again.
inline void synchronize() {
  for (bool running = true; running;) {
    running = false;
    if (schedule == Schedule::kLastStream) {
      for (auto i = streams.rbegin(); i != streams.rend() && !running; ++i) running = advance(i->second);
    } else {
      for (auto i = streams.begin(); i != streams.end() && !running; ++i) running = advance(i->second);
    }
  }
  streams.clear();
}

}  // namespace emulation

struct EmulatedEvent {
  std::shared_ptr<bool> last_record = std::make_shared<bool>(true);
};
using cudaEvent_t = EmulatedEvent*;
constexpr unsigned cudaEventDisableTiming = 2;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new EmulatedEvent, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const auto done = std::make_shared<bool>(false);
  event->last_record = done;
  emulation::queue(stream, [done] { *done = true; });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emulation::queue(stream, [] {}, event->last_record);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t stream) {
  emulation::queue(stream, [=] { std::memset(target, value, bytes); });
  return cudaSuccess;
}

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

// The three instructions of the special-function unit in use, by their text.
inline float ptx(const char* text, float x) {
  return std::strstr(text, "rcp.") ? 1.0f / x : std::strstr(text, "lg2.") ? std::log2(x) : std::exp2(x);
}

}  // namespace emulation

// In all places asm reads x and writes y.
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
std::function<void()> bound(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  // Arguments are copied by the launch.
  const std::tuple<std::remove_reference_t<Parameters>...> copies{
      *static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...};
  return [kernel, copies] { std::apply(kernel, copies); };
}
template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t stream) {
  const std::function<void()> body = bound(kernel, arguments, std::index_sequence_for<Parameters...>());
  emulation::queue(stream, [body, grid, block] {
    emulation::body = &body;
    for (unsigned i = 0; i < grid.x; ++i) {
      blockIdx.x = i;
      emulation::run_block(block.x);
    }
    emulation::body = nullptr;
  });
  return cudaSuccess;
}

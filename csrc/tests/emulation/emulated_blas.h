// What the emulated cuBLAS takes as its handle.
#pragma once

#include <functional>

struct EmulatedBlas {
  int magic = 0x626c6173;  // another value: a handle that was never made
  void* stream = nullptr;
  // Queues work on a stream of the emulation, which lives in the executable.
  std::function<void(void* stream, std::function<void()> work)> queue;
};

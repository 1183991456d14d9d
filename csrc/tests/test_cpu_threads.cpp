// Work divided among threads, also when there is no memory for a thread. Exit status 0 only where all hold.
#include "cpu_threads.h"

#include <cstdlib>
#include <new>

#include "reference.h"

namespace {

std::atomic<int> allocations_left{-1};  // until one fails; negative: none fails

void* allocate(std::size_t size) {
  if (allocations_left.load() >= 0 && allocations_left.fetch_sub(1) == 0) return nullptr;
  return std::malloc(size ? size : 1);
}

}  // namespace

void* operator new(std::size_t size) {
  void* const memory = allocate(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  constexpr int kThreads = 6, kItems = 100;
  // The list of threads is one allocation, each thread another; from a number on, none fails any more.
  for (int failing = -1; failing < 2 * kThreads; ++failing) {
    std::atomic<int> done[kItems] = {}, wrong_thread{0};
    allocations_left = failing;
    exaonepath::run_on_threads(kItems, kThreads, [&](std::int64_t i, int thread) {
      done[i].fetch_add(1);
      if (thread < 0 || thread >= kThreads) wrong_thread.fetch_add(1);
    });
    allocations_left = -1;
    for (const auto& times : done) expect(times == 1, "each item once, with failing allocation " + std::to_string(failing));
    expect(wrong_thread == 0, "numbers of threads");
  }
  return finish();
}

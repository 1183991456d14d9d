// Work divided among threads that are started for each call, without OpenMP: torch contains its own OpenMP runtime under
// a private name, and a second runtime would keep a second set of spinning workers on the same cores. No state is left
// for fork() either.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace exaonepath {

// work(i, thread) for each i below `count`, in any order, with 0 <= thread < threads; `work` must not throw.
template <typename Work>
void run_on_threads(std::int64_t count, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto worker = [&](int thread) {
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i, thread);
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<std::size_t>(threads - 1));
    for (int thread = 1; thread < threads; ++thread) helpers.emplace_back(worker, thread);
  } catch (...) {
    // No more threads, or no memory for them: those that started, and this one, do all of it. Nothing may leave this
    // function before they are joined.
  }
  worker(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace exaonepath

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "attention_kernel.h"
#include "cpu_isa.h"
#include "cpu_threads.h"

namespace exaonepath {
namespace {

struct Functions {
  AttentionFunction forward;
  AttentionBackwardFunction backward;
};

const Isa<Functions> kIsas[] = {
#if defined(EXAONEPATH_X86_64)
    {"avx512", has_avx512, {attention_avx512, attention_backward_avx512}},
    {"avx2", has_avx2, {attention_avx2, attention_backward_avx2}},
    {"sse2", always, {attention_sse2, attention_backward_sse2}},
#else
    {"generic", always, {attention_generic, attention_backward_generic}},
#endif
};

// A thread takes about 20 us to start; it should find more work than that. In multiplications.
constexpr double kWorkPerThread = 4e6;
// Queries of one head that a thread computes at once: with more, threads would wait for the one with the longest
// segment; with fewer, packing its keys again would count.
constexpr std::int64_t kQueriesPerTask = 288;

struct Task {
  std::int64_t piece, head, first, count;  // queries first .. first + count of the piece
};

const Functions& check(const Attention& a, int threads, const std::string& isa) {
  const Functions* functions = find_isa(kIsas, isa);
  if (!functions) {
    throw std::invalid_argument("attention: this CPU or build has no instruction set \"" + isa + "\"");
  }
  if (a.count < 0 || a.heads < 0) throw std::invalid_argument("attention: sizes must not be negative");
  if (a.dim <= 0 || a.dim % kAttentionDims) throw std::invalid_argument("attention: dim must be a multiple of 16");
  if (threads < 1) throw std::invalid_argument("attention: threads must be 1 or more");
  if (!a.q_cos != !a.q_sin || !a.k_cos != !a.k_sin) throw std::invalid_argument("attention: cos and sin go together");
  if (a.count == 0) return *functions;
  if (!a.pieces || !a.q.data || !a.k.data || !a.v.data) throw std::invalid_argument("attention: null pointer");
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t* piece = a.pieces + 4 * i;
    if (piece[0] < 0 || piece[1] < 0 || piece[2] < 0 || piece[3] < 1) {
      throw std::invalid_argument("attention: a piece needs a key, and no negative number");
    }
  }
  return *functions;
}

// The longest first, so that no thread begins one when the others are at the end.
std::vector<std::int64_t> longest_first(const Attention& a) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(a.count));
  for (std::int64_t i = 0; i < a.count; ++i) order[static_cast<std::size_t>(i)] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t i, std::int64_t j) { return a.pieces[4 * i + 3] > a.pieces[4 * j + 3]; });
  return order;
}

int useful_threads(const Attention& a, std::size_t tasks, int threads) {
  double work = 0;
  for (std::int64_t i = 0; i < a.count; ++i) {
    // Packing and rotation are some 20 operations a number.
    work += 2.0 * a.heads * a.dim * static_cast<double>(a.pieces[4 * i + 1] + 20) * a.pieces[4 * i + 3];
  }
  const double useful = std::min({work / kWorkPerThread, static_cast<double>(tasks), static_cast<double>(threads)});
  return std::max(1, static_cast<int>(useful));
}

// Memory of one thread, aligned for vectors.
struct Workspace {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data;

  explicit Workspace(std::int64_t floats)
      : data(static_cast<float*>(
            ::operator new[](static_cast<std::size_t>(floats) * sizeof(float), std::align_val_t{64}))) {}
};

AttentionHead head_of(const Attention& a, const Task& task) {
  const std::int64_t* piece = a.pieces + 4 * task.piece;
  const std::int64_t query = piece[0] + task.first, key = piece[2], half = a.dim / 2;
  return {{a.q.at(query, task.head), a.q.token_stride},
          {a.k.at(key, task.head), a.k.token_stride},
          {a.v.at(key, task.head), a.v.token_stride},
          a.q_cos ? a.q_cos + query * half : nullptr,
          a.q_cos ? a.q_sin + query * half : nullptr,
          a.k_cos ? a.k_cos + key * half : nullptr,
          a.k_cos ? a.k_sin + key * half : nullptr,
          task.count,
          piece[3],
          a.dim,
          static_cast<float>(a.scale)};
}

template <typename Run>
void run(const Attention& a, const std::vector<Task>& tasks, std::int64_t floats, int threads, const Run& compute) {
  const int useful = useful_threads(a, tasks.size(), threads);
  std::vector<Workspace> workspaces;
  for (int i = 0; i < useful; ++i) workspaces.emplace_back(floats);
  run_on_threads(static_cast<std::int64_t>(tasks.size()), useful, [&](std::int64_t i, int thread) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    compute(task, head_of(a, task), workspaces[static_cast<std::size_t>(thread)].data.get());
  });
}

}  // namespace

void attention_cpu(const Attention& a, Tokens<float> out, int threads, const std::string& isa) {
  const AttentionFunction attend = check(a, threads, isa).forward;
  if (a.count == 0) return;
  if (!out.data) throw std::invalid_argument("attention: null pointer");
  std::vector<Task> tasks;
  std::int64_t floats = 0;
  for (const std::int64_t piece : longest_first(a)) {
    const std::int64_t queries = a.pieces[4 * piece + 1], keys = a.pieces[4 * piece + 3];
    floats = std::max(floats, attention_workspace(keys, a.dim));
    // Whole blocks, so that a query's result does not depend on where the tasks are cut.
    const std::int64_t block = attention_block(keys);
    const std::int64_t step = std::max(block, kQueriesPerTask / block * block);
    for (std::int64_t first = 0; first < queries; first += step) {
      for (std::int64_t head = 0; head < a.heads; ++head) {
        tasks.push_back({piece, head, first, std::min(step, queries - first)});
      }
    }
  }
  run(a, tasks, floats, threads, [&](const Task& task, const AttentionHead& head, float* workspace) {
    const std::int64_t query = a.pieces[4 * task.piece] + task.first;
    attend(head, out.at(query, task.head), out.token_stride, workspace);
  });
}

void attention_backward_cpu(const Attention& a, Tokens<const float> dout, Tokens<float> dq, Tokens<float> dk,
                            Tokens<float> dv, int threads, const std::string& isa) {
  const AttentionBackwardFunction attend_backward = check(a, threads, isa).backward;
  if (a.count == 0) return;
  if (!dout.data || !dq.data || !dk.data || !dv.data) throw std::invalid_argument("attention: null pointer");
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t* piece = a.pieces + 4 * i;
    if (piece[0] != piece[2] || piece[1] != piece[3]) {
      throw std::invalid_argument("attention: gradients need queries and keys of the same tokens");
    }
  }
  std::vector<Task> tasks;
  std::int64_t floats = 0;
  for (const std::int64_t piece : longest_first(a)) {
    floats = std::max(floats, attention_backward_workspace(a.pieces[4 * piece + 3], a.dim));
    for (std::int64_t head = 0; head < a.heads; ++head) tasks.push_back({piece, head, 0, a.pieces[4 * piece + 1]});
  }
  run(a, tasks, floats, threads, [&](const Task& task, const AttentionHead& head, float* workspace) {
    const std::int64_t token = a.pieces[4 * task.piece];
    attend_backward(head,
                    {{dout.at(token, task.head), dout.token_stride},
                     dq.at(token, task.head),
                     dk.at(token, task.head),
                     dv.at(token, task.head),
                     dq.token_stride,
                     dk.token_stride,
                     dv.token_stride},
                    workspace);
  });
}

}  // namespace exaonepath

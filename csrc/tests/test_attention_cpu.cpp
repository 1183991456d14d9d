// Attention on the CPU against double precision, with every instruction set this machine has. Exit status 0 only where
// all hold. Tensors have exactly the elements that the contract says are there, so that a sanitizer sees a step beyond.
#include "attention.h"

#include <limits>

#include "reference.h"

namespace {

using exaonepath::Attention;
using exaonepath::Tokens;
using Index = std::int64_t;

struct Problem {
  std::vector<Index> lengths;
  Index heads, dim, tokens = 0;
  bool rotated;
  double scale = 0.3;
  std::vector<Index> pieces;
  std::vector<float> q, k, v, cos, sin, dout;

  Problem(std::vector<Index> lengths, Index heads, Index dim, bool rotated)
      : lengths(lengths), heads(heads), dim(dim), rotated(rotated) {
    for (const Index length : lengths) {
      pieces.insert(pieces.end(), {tokens, length, tokens, length});
      tokens += length;
    }
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v, &dout}) {
      x->resize(static_cast<std::size_t>(tokens * heads * dim));
      for (float& value : *x) value = normal(random);
    }
    for (Index i = 0; i < tokens * dim / 2; ++i) {
      const float angle = 3 * normal(random);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
  }

  template <typename T, typename Values>
  Tokens<T> strided(Values& x) const {
    return {x.data(), heads * dim, dim};
  }
  Attention attention() const {
    const float *c = rotated ? cos.data() : nullptr, *s = rotated ? sin.data() : nullptr;
    return {strided<const float>(q), strided<const float>(k), strided<const float>(v), c, s, c, s, pieces.data(),
            static_cast<Index>(lengths.size()), heads, dim, scale};
  }
  std::vector<float> empty() const {
    return std::vector<float>(q.size(), std::numeric_limits<float>::quiet_NaN());
  }

  double rotate(const std::vector<float>& x, Index token, Index head, Index d) const {
    const auto at = [&](Index i) { return static_cast<double>(x[(token * heads + head) * dim + i]); };
    if (!rotated) return at(d);
    const Index half = dim / 2, pair = d % half;
    const double c = cos[token * half + pair], s = sin[token * half + pair];
    return d < half ? at(d) * c - at(d + half) * s : at(d) * c + at(d - half) * s;
  }
};

using Values = std::vector<double>;

// Gradient of a rotated row back to that of the row.
void rotate_back(const Problem& p, Values& x) {
  if (!p.rotated) return;
  const Index half = p.dim / 2;
  for (Index token = 0; token < p.tokens; ++token) {
    for (Index head = 0; head < p.heads; ++head) {
      for (Index d = 0; d < half; ++d) {
        double &a = x[(token * p.heads + head) * p.dim + d], &b = x[(token * p.heads + head) * p.dim + d + half];
        const double c = p.cos[token * half + d], s = p.sin[token * half + d], first = a * c + b * s;
        b = b * c - a * s;
        a = first;
      }
    }
  }
}

// out, dq, dk, dv
std::vector<Values> exact(const Problem& p) {
  std::vector<Values> result(4, Values(p.q.size()));
  Index first = 0;
  for (const Index n : p.lengths) {
    for (Index head = 0; head < p.heads; ++head) {
      const auto at = [&](Index i, Index d) { return ((first + i) * p.heads + head) * p.dim + d; };
      Values q(n * p.dim), k(n * p.dim);
      for (Index i = 0; i < n; ++i) {
        for (Index d = 0; d < p.dim; ++d) {
          q[i * p.dim + d] = p.rotate(p.q, first + i, head, d);
          k[i * p.dim + d] = p.rotate(p.k, first + i, head, d);
        }
      }
      for (Index i = 0; i < n; ++i) {
        Values w(n), dw(n);
        double top = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
        for (Index j = 0; j < n; ++j) {
          for (Index d = 0; d < p.dim; ++d) {
            w[j] += p.scale * q[i * p.dim + d] * k[j * p.dim + d];
            dw[j] += static_cast<double>(p.dout[at(i, d)]) * p.v[at(j, d)];
          }
          top = std::max(top, w[j]);
        }
        for (double& x : w) sum += x = std::exp(x - top);
        for (double& x : w) x /= sum;
        for (Index j = 0; j < n; ++j) delta += w[j] * dw[j];
        for (Index j = 0; j < n; ++j) {
          const double ds = w[j] * (dw[j] - delta) * p.scale;
          for (Index d = 0; d < p.dim; ++d) {
            result[0][at(i, d)] += w[j] * p.v[at(j, d)];
            result[1][at(i, d)] += ds * k[j * p.dim + d];
            result[2][at(j, d)] += ds * q[i * p.dim + d];
            result[3][at(j, d)] += w[j] * p.dout[at(i, d)];
          }
        }
      }
    }
    first += n;
  }
  rotate_back(p, result[1]);
  rotate_back(p, result[2]);
  return result;
}

double relative(const std::vector<float>& found, const Values& wanted) {
  double error = 0, norm = 1e-300;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
    norm += wanted[i] * wanted[i];
  }
  return std::sqrt(error / norm);
}

std::vector<std::vector<float>> compute(const Problem& p, const std::string& isa, int threads) {
  std::vector<std::vector<float>> found(4, p.empty());
  exaonepath::attention_cpu(p.attention(), p.strided<float>(found[0]), threads, isa);
  exaonepath::attention_backward_cpu(p.attention(), p.strided<const float>(p.dout), p.strided<float>(found[1]),
                                     p.strided<float>(found[2]), p.strided<float>(found[3]), threads, isa);
  return found;
}

void sizes(const std::string& isa) {
  double worst = 0;
  for (const Index dim : {16, 48, 64, 80}) {
    for (const bool rotated : {false, true}) {
      const std::vector<std::vector<Index>> cases = {{1}, {2, 3}, {7, 8, 9}, {11, 12, 13, 15}, {16, 17}, {31, 32, 33},
                                                     {95, 96, 97}, {130}};
      for (const auto& lengths : cases) {
        const Problem p(lengths, 2, dim, rotated);
        const auto wanted = exact(p);
        const auto found = compute(p, isa, 1);
        for (int i = 0; i < 4; ++i) {
          const double error = relative(found[i], wanted[i]);
          worst = std::max(worst, error);
          // A segment of one token has no gradient but that of its value.
          expect(error < 2e-6 || lengths == std::vector<Index>{1}, isa + ": result " + std::to_string(i));
        }
        expect(compute(p, isa, 3) == found || lengths == std::vector<Index>{1}, isa + ": threads");
      }
    }
  }
  // Blocks of queries (of 12 keys and more), and tasks that are cut.
  const Problem p({1500, 3}, 1, 16, true);
  const auto wanted = exact(p);
  const auto found = compute(p, isa, 2);
  for (int i = 0; i < 4; ++i) expect(relative(found[i], wanted[i]) < 2e-6, isa + ": long");
  std::printf("%s: within %.1e\n", isa.c_str(), worst);
}

void in_place(const std::string& isa) {
  Problem p({5, 400, 1}, 2, 32, true);
  auto out = p.empty();
  exaonepath::attention_cpu(p.attention(), p.strided<float>(out), 2, isa);
  std::vector<float> q = p.q;
  Attention attention = p.attention();
  attention.q = p.strided<const float>(q);
  exaonepath::attention_cpu(attention, p.strided<float>(q), 2, isa);
  expect(q == out, isa + ": in place");
  // Some queries of a segment.
  std::vector<float> some = p.empty();
  const std::vector<Index> pieces = {5 + 37, 100, 5, 400};
  attention = p.attention();
  attention.pieces = pieces.data();
  attention.count = 1;
  exaonepath::attention_cpu(attention, p.strided<float>(some), 1, isa);
  const Index row = p.heads * p.dim;
  expect(std::equal(some.begin() + 42 * row, some.begin() + 142 * row, out.begin() + 42 * row), isa + ": some queries");
  expect(std::isnan(some[42 * row - 1]) && std::isnan(some[142 * row]), isa + ": other queries are not touched");
}

void extremes(const std::string& isa) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem p({9, 20, 9}, 1, 16, false);
    const auto clean = compute(p, isa, 1);
    p.k[12 * 16] = bad;
    const auto found = compute(p, isa, 1);
    for (int i = 0; i < 4; ++i) {
      expect(std::equal(found[i].begin(), found[i].begin() + 9 * 16, clean[i].begin()) &&
                 std::equal(found[i].begin() + 29 * 16, found[i].end(), clean[i].begin() + 29 * 16),
             isa + ": a bad key stays in its segment");
    }
    expect(std::isnan(found[0][10 * 16]) || bad == bad, isa + ": NaN passes");
  }
  // Scores of 1e4 and -1e4: one key takes all, and nothing overflows.
  Problem p({2}, 1, 16, false);
  std::fill(p.q.begin(), p.q.end(), 0.0f);
  p.q[0] = p.q[16] = p.k[0] = 200.0f;
  p.k[16] = -200.0f;
  const auto found = compute(p, isa, 1);
  expect(std::equal(p.v.begin(), p.v.begin() + 16, found[0].begin()), isa + ": one key takes all");
}

void refusals() {
  Problem p({4}, 1, 16, true);
  auto out = p.empty();
  const Attention good = p.attention();
  const auto attend = [&](const Attention& a, int threads = 1, const std::string& isa = "") {
    exaonepath::attention_cpu(a, p.strided<float>(out), threads, isa);
  };
  Attention bad = good;
  bad.dim = 8;
  refuses("dim", [&] { attend(bad); });
  bad = good;
  bad.count = -1;
  refuses("count", [&] { attend(bad); });
  bad = good;
  bad.q.data = nullptr;
  refuses("null", [&] { attend(bad); });
  bad = good;
  bad.k_sin = nullptr;
  refuses("half an angle", [&] { attend(bad); });
  refuses("threads", [&] { attend(good, 0); });
  refuses("isa", [&] { attend(good, 1, "mmx"); });
  const std::vector<Index> empty = {0, 4, 0, 0};
  bad = good;
  bad.pieces = empty.data();
  refuses("no key", [&] { attend(bad); });
  bad = good;
  bad.count = 0;
  bad.pieces = nullptr;
  attend(bad);
  expect(std::isnan(out[0]), "nothing to do");
}

}  // namespace

int main() {
  for (const std::string& isa : exaonepath::sigmoid_cpu_isas()) {
    sizes(isa);
    in_place(isa);
    extremes(isa);
  }
  refusals();
  return finish();
}

// Sampling against a float64 reference that sorts the row.
#include "kernels/sample.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "testing.h"

using namespace vllm_ms;
using testing::Random;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kTolerance = 2e-6;  // of a probability: weights are float32

struct Token {
  bool kept;
  double below, upto;  // its interval of the distribution function over the kept tokens
};

// top_k 0 and top_p 1 keep all. `slack` widens (or, negative, narrows) what top-p keeps, for sums at its very limit.
std::vector<Token> reference(const float *x, int64_t vocab, int64_t k, double p, double slack) {
  std::vector<int64_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [x](int64_t a, int64_t b) { return x[a] > x[b]; });
  const float smallest = k > 0 && k < vocab ? x[order[k - 1]] : -kInfinity;
  std::vector<double> weights(vocab);
  double mass = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    weights[i] = x[i] >= smallest ? std::exp(double{x[i]} - x[order[0]]) : 0.0;
    mass += weights[i];
  }
  std::vector<Token> tokens(vocab);
  double above = 0, kept_mass = 0, sum = 0;
  for (int64_t i : order) {
    tokens[i].kept = weights[i] > 0 && (p >= 1.0 || i == order[0] || above < p * mass + slack * mass);
    above += weights[i];
    if (tokens[i].kept) kept_mass += weights[i];
  }
  for (int64_t i = 0; i < vocab; ++i) {
    tokens[i].below = sum / kept_mass;
    if (tokens[i].kept) sum += weights[i];
    tokens[i].upto = sum / kept_mass;
  }
  return tokens;
}

struct Batch {
  int64_t rows, vocab, stride;
  std::vector<float> logits;
  std::vector<int32_t> top_k;
  std::vector<float> top_p;
  std::vector<double> uniform;

  std::vector<int64_t> sample() const {
    std::vector<int64_t> out(rows, -1);
    SampleArgs args{{logits.data(), rows, vocab, stride}, top_k.data(), top_p.data(), uniform.data(), out.data()};
    sample_rows(args);
    return out;
  }
};

// Every kind of limit, of row (flat, peaked, mostly masked, far apart) and of uniform, including 0 and almost 1.
Batch random_batch(int64_t rows, int64_t vocab, uint32_t seed) {
  Random random(seed);
  Batch batch{rows, vocab, vocab + 3, {}, {}, {}, {}};
  batch.logits = random.normals(rows * batch.stride);
  const float scales[] = {1.0f, 5.0f, 0.01f, 1000.0f};
  const float ps[] = {1.0f, 0.9f, 0.3f, 1e-6f, 0.999f};
  for (int64_t r = 0; r < rows; ++r) {
    float *x = batch.logits.data() + r * batch.stride;
    for (int64_t i = 0; i < vocab; ++i) {
      x[i] *= scales[r % 4];
      if (r % 5 == 4 && random.below(4) > 0) x[i] = -kInfinity;
    }
    x[random.below(vocab)] = 3.0f;
    const int64_t ks[] = {0, 1, 2, 50, vocab / 2, vocab - 1, vocab, vocab + 7};
    batch.top_k.push_back(static_cast<int32_t>(ks[random.below(8)]));
    batch.top_p.push_back(ps[random.below(5)]);
    batch.uniform.push_back(r % 7 == 0 ? 0.0 : r % 7 == 1 ? 1.0 - 0x1p-53 : random.below(1 << 20) * 0x1p-20);
  }
  return batch;
}

}  // namespace

TEST(sampled_tokens_are_those_of_the_sorted_reference) {
  for (int64_t vocab : {1, 2, 15, 16, 17, 127, 128, 129, 1000, 5003}) {
    const Batch batch = random_batch(60, vocab, static_cast<uint32_t>(vocab));
    testing::for_each_isa([&] {
      const std::vector<int64_t> tokens = batch.sample();
      for (int64_t r = 0; r < batch.rows; ++r) {
        const float *x = batch.logits.data() + r * batch.stride;
        const double p = batch.top_p[r], u = batch.uniform[r];
        const int64_t t = tokens[r];
        CHECK(t >= 0 && t < vocab) << t;
        const Token wide = reference(x, vocab, batch.top_k[r], p, kTolerance)[t];
        const Token narrow = reference(x, vocab, batch.top_k[r], p, -kTolerance)[t];
        const double below = std::min(wide.below, narrow.below), upto = std::max(wide.upto, narrow.upto);
        CHECK(wide.kept && u >= below - kTolerance && u <= upto + kTolerance)
            << "vocab " << vocab << " row " << r << " k " << batch.top_k[r] << " p " << p << " u " << u << " token " << t;
      }
    });
  }
}

TEST(sampled_tokens_do_not_depend_on_threads_or_other_rows) {
  const int before = num_threads();
  const Batch batch = random_batch(7, 40001, 1);
  testing::for_each_isa([&] {
    std::vector<int64_t> alone;
    set_num_threads(1);
    for (int64_t r = 0; r < batch.rows; ++r) {
      int64_t token = -1;
      sample_rows({{batch.logits.data() + r * batch.stride, 1, batch.vocab, batch.stride},
                   &batch.top_k[r], &batch.top_p[r], &batch.uniform[r], &token});
      alone.push_back(token);
    }
    for (int threads : {1, 2, 3, 8}) {  // 8: more threads than rows
      set_num_threads(threads);
      CHECK(batch.sample() == alone) << threads << " threads";
    }
  });
  set_num_threads(before);
}

TEST(argmax_is_the_first_of_the_largest_and_the_first_nan) {
  const int before = num_threads();
  for (int threads : {1, 3}) {
    set_num_threads(threads);
    for (int64_t vocab : {1, 3, 16, 128, 129, 20000}) {
      Random random(static_cast<uint32_t>(vocab));
      std::vector<float> x = random.normals(vocab);
      const int64_t first = random.below(vocab), second = first + random.below(vocab - first);
      const auto check = [&](int64_t expected) {
        testing::for_each_isa([&] {
          int64_t found = -1;
          argmax_rows({{x.data(), 1, vocab, vocab}, &found});
          CHECK(found == expected) << "vocab " << vocab << ": " << found << ", not " << expected;
        });
      };
      x[first] = x[second] = 100.0f;
      check(first);
      x[second] = kInfinity;
      check(second);
      x[first] = -std::nanf("");
      x[second] = std::nanf("");
      check(first);
      std::fill(x.begin(), x.end(), -kInfinity);
      check(0);
    }
  }
  set_num_threads(before);
}

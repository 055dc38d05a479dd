#include <algorithm>

#include "kernels/moe_experts.h"
#include "kernels/moe_route.h"
#include "parallel.h"

#include "testing.h"

using namespace vllm_ms;
using testing::Stored;

namespace {

struct Case {
  int64_t tokens, top_k, experts, hidden, inter, width;
  DType dtype;
  std::vector<float> x, routing, residual;
  Stored w13, w2, w13_bias, w2_bias;

  Case(int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden, int64_t inter, int64_t width, DType dtype,
       uint32_t seed)
      : Case(tokens, top_k, experts, hidden, inter, width, dtype, testing::Random(seed)) {}

  MoeExpertsArgs args(float *out) const {
    MoeExpertsArgs args{};
    args.x = x.data();
    args.routing = routing.data();
    args.w13 = w13.weight();
    args.w2 = w2.weight();
    args.w13_bias = w13_bias.weight();
    args.w2_bias = w2_bias.weight();
    args.residual = residual.data();
    args.out = out;
    args.tokens = tokens;
    args.top_k = top_k;
    args.experts = experts;
    args.hidden = hidden;
    args.inter = inter;
    args.width = width;
    args.activation = {Activation::silu, true};
    return args;
  }

  std::vector<float> run() const {
    std::vector<float> out(tokens * width, NAN);
    moe_experts(args(out.data()));
    return out;
  }

  bool rounds() const { return dtype == DType::bf16 && (isa() == Isa::avx512 || isa() == Isa::amx); }
  double tolerance() const { return rounds() ? 2e-3 : 5e-6; }

  std::vector<double> reference() const {
    std::vector<double> out(residual.begin(), residual.end()), middle(inter);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < top_k; ++j) {
        const int64_t e = static_cast<int64_t>(routing[2 * t * top_k + j]);
        for (int64_t i = 0; i < inter; ++i) {
          const double gate = first(t, e, i), up = first(t, e, inter + i);
          middle[i] = rounded(gate / (1 + std::exp(-gate)) * up);
        }
        for (int64_t n = 0; n < width; ++n) {
          double sum = w2_bias[e * width + n];
          for (int64_t i = 0; i < inter; ++i) sum += w2[(e * width + n) * inter + i] * middle[i];
          out[t * width + n] += routing[(2 * t + 1) * top_k + j] * sum;
        }
      }
    }
    return out;
  }

 private:
  Case(int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden, int64_t inter, int64_t width, DType dtype,
       testing::Random random)
      : tokens(tokens), top_k(top_k), experts(experts), hidden(hidden), inter(inter), width(width), dtype(dtype),
        x(random.normals(tokens * hidden)), routing(2 * tokens * top_k), residual(random.normals(tokens * width)),
        w13(random.normals(experts * 2 * inter * hidden, 1 / std::sqrt(hidden)), dtype),
        w2(random.normals(experts * width * inter, 1 / std::sqrt(inter)), dtype),
        w13_bias(random.normals(experts * 2 * inter), dtype), w2_bias(random.normals(experts * width), dtype) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t first = random.below(experts);
      for (int64_t j = 0; j < top_k; ++j) {
        routing[2 * t * top_k + j] = static_cast<float>((first + j) % experts);
        routing[(2 * t + 1) * top_k + j] = std::fabs(random.normal());
      }
    }
  }

  double rounded(double value) const {
    if (!rounds()) return value;
    bf16 stored;
    from_float(static_cast<float>(value), &stored);
    return to_float(stored);
  }

  double first(int64_t t, int64_t e, int64_t row) const {
    double sum = w13_bias[e * 2 * inter + row];
    for (int64_t k = 0; k < hidden; ++k) {
      sum += w13[(e * 2 * inter + row) * hidden + k] * rounded(x[t * hidden + k]);
    }
    return sum;
  }
};

}  // namespace

TEST(moe_experts_of_odd_shapes) {
  testing::for_each_isa([] {
    uint32_t seed = 0;
    for (DType dtype : testing::kFloatTypes) {
      for (int64_t tokens : {0, 1, 2, 7, 33}) {
        for (int64_t hidden : {1, 33, 70}) {
          for (int64_t inter : {1, 17, 48}) {
            const Case c(tokens, 2, 5, hidden, inter, 19, dtype, ++seed);
            const double error = testing::max_error(c.run(), c.reference());
            CHECK(error < c.tolerance()) << error << " tokens " << tokens << " hidden " << hidden << " inter " << inter
                                         << " " << testing::dtype_name(dtype);
          }
        }
      }
    }
  });
}

TEST(moe_experts_bits_do_not_depend_on_threads) {
  const int before = num_threads();
  testing::for_each_isa([] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t tokens : {1, 3, 90}) {
        const Case c(tokens, 3, 9, 200, 70, 130, dtype, 7);
        set_num_threads(1);
        const std::vector<float> serial = c.run();
        for (int threads : {2, 3, 7}) {
          set_num_threads(threads);
          CHECK(testing::same_bits(c.run().data(), serial.data(), serial.size())) << threads << " threads";
        }
      }
    }
  });
  set_num_threads(before);
}

TEST(moe_experts_row_bits_do_not_depend_on_the_batch) {
  testing::for_each_isa([] {
    for (DType dtype : testing::kFloatTypes) {
      const Case c(50, 2, 4, 1100, 40, 33, dtype, 11);
      const std::vector<float> together = c.run();
      for (int64_t count : {1, 2, 3, 5, 23}) {
        for (int64_t first = 0; first + count <= c.tokens; first += 13) {
          std::vector<float> some(count * c.width);
          MoeExpertsArgs args = c.args(some.data());
          args.x += first * c.hidden;
          args.routing += first * 2 * c.top_k;
          args.residual += first * c.width;
          args.tokens = count;
          moe_experts(args);
          CHECK(testing::same_bits(some.data(), together.data() + first * c.width, some.size()))
              << testing::dtype_name(dtype) << " rows " << first << "+" << count;
        }
      }
    }
  });
}

TEST(moe_experts_of_more_tokens_than_are_computed_at_once) {
  const Case c(1600, 1, 2, 1, 20000, 2, DType::f32, 3);
  const double error = testing::max_error(c.run(), c.reference());
  CHECK(error < 1e-4) << error;  // sums of 20,000 products
}

TEST(moe_route_bits_do_not_depend_on_threads_or_batch) {
  const int before = num_threads();
  testing::for_each_isa([] {
    testing::Random random(5);
    const int64_t rows = 300, experts = 35, top_k = 5;
    const std::vector<float> logits = random.normals(rows * experts);
    const Stored bias(random.normals(experts), DType::bf16), scale(random.normals(experts), DType::fp16);
    for (Scoring scoring : {Scoring::softmax, Scoring::sigmoid}) {
      for (int64_t groups : {1, 5}) {
        const auto route = [&](int64_t first, int64_t count) {
          std::vector<float> out(count * 2 * top_k, NAN);
          moe_route({logits.data() + first * experts, bias.weight(), scale.weight(), out.data(), count, experts, top_k,
                     scoring, true, groups, groups, groups > 1, 1.5f});
          return out;
        };
        set_num_threads(1);
        const std::vector<float> whole = route(0, rows);
        set_num_threads(3);
        CHECK(testing::same_bits(route(0, rows).data(), whole.data(), whole.size()));
        for (int64_t r : {0, 17, 299}) CHECK(testing::same_bits(route(r, 1).data(), &whole[r * 2 * top_k], 2 * top_k));
      }
    }
  });
  set_num_threads(before);
}

TEST(moe_route_chooses_equally_many_of_each_group) {
  testing::for_each_isa([] {
    uint32_t seed = 20;
    for (int64_t groups : {1, 2, 7}) {
      for (int64_t size : {1, 3, 8, 19}) {
        for (int64_t each : {int64_t{1}, (size + 1) / 2, size}) {
          const int64_t rows = 9, experts = groups * size, top_k = groups * each;
          testing::Random random(++seed);
          const std::vector<float> logits = random.normals(rows * experts, 3);
          const Stored scale(random.normals(experts), DType::f32);
          std::vector<float> out(rows * 2 * top_k, NAN);
          moe_route({logits.data(), Weight{}, scale.weight(), out.data(), rows, experts, top_k, Scoring::softmax, false,
                     groups, groups, true, 1.0f});
          for (int64_t r = 0; r < rows; ++r) {
            const float *row = &logits[r * experts], *ids = &out[r * 2 * top_k];
            double sum = 0;
            for (int64_t e = 0; e < experts; ++e) sum += std::exp(static_cast<double>(row[e]));
            for (int64_t e = 0; e < experts; ++e) {
              int64_t better = 0;
              for (int64_t o = e / size * size; o < (e / size + 1) * size; ++o) better += row[o] > row[e];
              const float *found = std::find(ids, ids + top_k, static_cast<float>(e));
              CHECK((found != ids + top_k) == (better < each)) << groups << " groups of " << size << ", expert " << e;
              if (found == ids + top_k) continue;
              const double weight = std::exp(static_cast<double>(row[e])) / sum * scale[e];
              CHECK(std::fabs(found[top_k] - weight) <= 2e-6 * std::fabs(weight)) << found[top_k] << " " << weight;
            }
          }
        }
      }
    }
  });
}

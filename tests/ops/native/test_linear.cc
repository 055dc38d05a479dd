#include "kernels/linear.h"

#include "testing.h"

using namespace vllm_ms;
using testing::Stored;

namespace {

double activate(Activation::Kind kind, double x) {
  switch (kind) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu2:
      return x > 0 ? x * x : 0;
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    default:
      return x;
  }
}

struct Case {
  int64_t m, n, k;
  DType dtype;
  Activation activation;
  Norm norm;
  bool extras;  // bias, residual and norm weights

  std::vector<float> x, residual;
  Stored weight, bias, norm_weight, norm_bias;
  static constexpr float kEps = 1e-5f, kOffset = 1.0f;

  Case(int64_t m, int64_t n, int64_t k, DType dtype, Activation activation, Norm norm, bool extras, uint32_t seed)
      : Case(m, n, k, dtype, activation, norm, extras, testing::Random(seed)) {}

  int64_t width() const { return activation.gated ? n / 2 : n; }

  LinearArgs args(float *out) const {
    return {x.data(),        weight.weight(), extras ? bias.weight() : Weight{},
            extras ? residual.data() : nullptr, out,             m,
            n,               k,               activation,
            norm,            extras && norm != Norm::none ? norm_weight.weight() : Weight{},
            extras && norm == Norm::layer ? norm_bias.weight() : Weight{}, kEps, kOffset};
  }

  std::vector<float> run() const {
    std::vector<float> out(m * width(), NAN);
    linear(args(out.data()));
    return out;
  }

  std::vector<double> reference() const {
    std::vector<double> out(m * width()), row(k), y(n);
    for (int64_t r = 0; r < m; ++r) {
      normalise(x.data() + r * k, row);
      for (int64_t i = 0; i < n; ++i) {
        y[i] = extras ? bias[i] : 0.0;
        for (int64_t j = 0; j < k; ++j) y[i] += row[j] * weight[i * k + j];
      }
      for (int64_t i = 0; i < width(); ++i) {
        double v = activate(activation.kind, y[i]);
        if (activation.gated) v *= y[width() + i];
        out[r * width() + i] = v + (extras ? residual[r * width() + i] : 0.0);
      }
    }
    return out;
  }

  // bf16 weights may be multiplied with activations rounded to bf16.
  double tolerance() const { return dtype == DType::bf16 && isa() >= Isa::avx512 ? 0.03 : 4e-6; }

 private:
  Case(int64_t m, int64_t n, int64_t k, DType dtype, Activation activation, Norm norm, bool extras,
       testing::Random &&random)
      : m(m),
        n(n),
        k(k),
        dtype(dtype),
        activation(activation),
        norm(norm),
        extras(extras),
        x(random.normals(m * k)),
        residual(random.normals(m * (activation.gated ? n / 2 : n))),
        weight(random.normals(n * k, 1.0f / std::sqrt(static_cast<float>(k))), dtype),
        bias(random.normals(n), dtype),
        norm_weight(random.normals(k, 0.2f), dtype),
        norm_bias(random.normals(k), dtype) {}

  void normalise(const float *in, std::vector<double> &out) const {
    double mean = 0.0, square = 0.0;
    if (norm == Norm::layer) {
      for (int64_t j = 0; j < k; ++j) mean += in[j] / static_cast<double>(k);
    }
    for (int64_t j = 0; j < k; ++j) square += (in[j] - mean) * (in[j] - mean) / k;
    for (int64_t j = 0; j < k; ++j) {
      double v = norm == Norm::none ? in[j] : (in[j] - mean) / std::sqrt(square + kEps);
      if (extras && norm != Norm::none) v *= norm_weight[j] + (norm == Norm::rms ? kOffset : 0.0f);
      if (extras && norm == Norm::layer) v += norm_bias[j];
      out[j] = v;
    }
  }
};

const Activation kActivations[] = {
    {Activation::identity, false}, {Activation::relu, false}, {Activation::silu, false}, {Activation::gelu, false},
    {Activation::gelu_tanh, false}, {Activation::relu2, false}, {Activation::sigmoid, false}, {Activation::silu, true},
    {Activation::gelu, true}, {Activation::gelu_tanh, true}};

}  // namespace

TEST(linear_against_float64_over_shapes) {
  testing::for_each_isa([] {
    uint32_t seed = 0;
    for (DType dtype : testing::kFloatTypes) {
      for (int64_t k : {1, 7, 16, 32, 33, 95, 520, 1300}) {
        for (int64_t n : {1, 2, 7, 8, 34, 70}) {
          for (int64_t m : {0, 1, 2, 3, 4, 5, 7, 29, 32, 33, 50, 800}) {
            if (k > 500 && n > 8 && m > 5 && m != 50) continue;
            if (m == 800 && (k < 33 || n < 34)) continue;
            const Case c(m, n, k, dtype, {}, Norm::none, false, ++seed);
            const double error = testing::max_error(c.run(), c.reference());
            CHECK(error < c.tolerance()) << error << " m " << m << " n " << n << " k " << k << " "
                                         << testing::dtype_name(dtype);
          }
        }
      }
    }
  });
}

TEST(linear_prologue_and_epilogue) {
  testing::for_each_isa([] {
    uint32_t seed = 1000;
    for (DType dtype : testing::kFloatTypes) {
      for (const Activation &activation : kActivations) {
        for (Norm norm : {Norm::none, Norm::rms, Norm::layer}) {
          for (bool extras : {false, true}) {
            const int64_t n = activation.gated ? 74 : 37;
            const Case c(5, n, 70, dtype, activation, norm, extras, ++seed);
            const double error = testing::max_error(c.run(), c.reference());
            CHECK(error < c.tolerance()) << error << " activation " << activation.kind << " norm "
                                         << static_cast<int>(norm) << " " << testing::dtype_name(dtype);
          }
        }
      }
    }
  });
}

TEST(linear_with_float32_weights_is_float32_accurate) {
  testing::for_each_isa([] {
    const Case c(9, 40, 3000, DType::f32, {}, Norm::none, false, 5);
    const double error = testing::max_error(c.run(), c.reference());
    CHECK(error < 1.5e-6) << error;
  });
}

TEST(linear_spanning_several_token_blocks) {
  testing::for_each_isa([] {
    for (DType dtype : testing::kFloatTypes) {
      const Case c(60, 24, 12000, dtype, {Activation::silu, true}, Norm::rms, true, 6);
      const double error = testing::max_error(c.run(), c.reference());
      CHECK(error < (c.tolerance() < 1e-3 ? 1e-5 : c.tolerance())) << error << " " << testing::dtype_name(dtype);
    }
  });
}

TEST(linear_row_bits_do_not_depend_on_the_batch) {
  testing::for_each_isa([] {
    for (DType dtype : testing::kFloatTypes) {
      for (int64_t k : {45, 1024, 2500}) {
        const int64_t m = 50;
        const Case c(m, 66, k, dtype, {Activation::silu, true}, Norm::rms, true, 7);
        const std::vector<float> together = c.run();
        for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 23}) {
          for (int64_t first = 0; first + count <= m; first += 9) {
            std::vector<float> some(count * c.width());
            LinearArgs args = c.args(some.data());
            args.x += first * k;
            args.residual += first * c.width();
            args.m = count;
            linear(args);
            CHECK(testing::same_bits(some.data(), together.data() + first * c.width(), count * c.width()))
                << testing::dtype_name(dtype) << " k " << k << " rows " << first << "+" << count;
          }
        }
      }
    }
  });
}

TEST(linear_results_too_large_for_the_caches_are_the_same) {
  testing::for_each_isa([] {
    for (int64_t n : {4000, 4001}) {  // rows that all begin at a multiple of a vector, and rows that do not
      const int64_t m = (18 << 20) / 4 / n, rows = 150;
      const Case c(m, n, 40, DType::bf16, {}, Norm::none, true, 10);
      const std::vector<float> whole = c.run();
      for (int64_t first = 0; first < m; first += rows) {
        LinearArgs args = c.args(nullptr);
        args.m = std::min(rows, m - first);
        args.x += first * c.k;
        args.residual += first * n;
        std::vector<float> some(args.m * n);
        args.out = some.data();
        linear(args);
        CHECK(testing::same_bits(some.data(), whole.data() + first * n, some.size())) << n << " from row " << first;
      }
    }
  });
}

TEST(linear_bits_do_not_depend_on_threads) {
  const int before = num_threads();
  testing::for_each_isa([] {
    const Case c(33, 200, 1500, DType::bf16, {}, Norm::layer, true, 8);
    set_num_threads(1);
    const std::vector<float> serial = c.run();
    for (int threads : {2, 3, 7}) {
      set_num_threads(threads);
      for (int repeat = 0; repeat < 3; ++repeat) {
        CHECK(testing::same_bits(c.run().data(), serial.data(), serial.size())) << threads << " threads";
      }
    }
  });
  set_num_threads(before);
}

TEST(linear_keeps_infinities_and_nans_to_their_rows) {
  testing::for_each_isa([] {
    Case c(6, 16, 40, DType::f32, {}, Norm::none, false, 9);
    const std::vector<float> clean = c.run();
    c.x[2 * 40 + 39] = NAN;
    c.x[4 * 40] = INFINITY;
    const std::vector<float> out = c.run();
    for (int64_t r : {0, 1, 3, 5}) CHECK(testing::same_bits(&out[r * 16], &clean[r * 16], 16)) << "row " << r;
    CHECK(std::isnan(out[2 * 16 + 3])) << out[2 * 16 + 3];
    CHECK(std::isinf(out[4 * 16 + 3])) << out[4 * 16 + 3];
  });
}

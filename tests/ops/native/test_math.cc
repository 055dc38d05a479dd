// Elementary functions through the activation kernel, and the storage types' conversions.
#include <cfenv>

#include "kernels/activation.h"
#include "kernels/binary.h"
#include "kernels/embedding.h"
#include "testing.h"

using namespace vllm_ms;

namespace {

float nearest(double value) { return static_cast<float>(value); }

std::vector<float> sweep() {
  std::vector<float> x = {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-8f, 3e38f, -3e38f, INFINITY, -INFINITY};
  for (int i = -4000; i <= 4000; ++i) x.push_back(static_cast<float>(i) * 0.0301f);
  return x;
}

}  // namespace

TEST(activations_against_float64) {
  testing::for_each_isa([] {
    const std::vector<float> x = sweep();
    const struct {
      Activation::Kind kind;
      double (*exact)(double);
    } functions[] = {
        {Activation::relu, [](double v) { return v > 0 ? v : 0.0; }},
        {Activation::silu, [](double v) { return v / (1 + std::exp(-v)); }},
        {Activation::gelu, [](double v) { return v * 0.5 * std::erfc(-v / std::sqrt(2.0)); }},
        {Activation::gelu_tanh,
         [](double v) { return v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))); }},
        {Activation::relu2, [](double v) { return v > 0 ? v * v : 0.0; }},
        {Activation::sigmoid, [](double v) { return 1 / (1 + std::exp(-v)); }},
    };
    for (const auto &function : functions) {
      std::vector<float> out(x.size(), NAN);
      activate_rows({x.data(), out.data(), 1, static_cast<int64_t>(x.size()), {function.kind, false}});
      for (size_t i = 0; i < x.size(); ++i) {
        if (x[i] == -INFINITY) continue;  // -inf * 0
        const float exact = nearest(function.exact(x[i]));
        const double error = out[i] == exact ? 0.0 : std::fabs(out[i] - exact) / (1e-5 + std::fabs(exact));
        CHECK(error < 2e-6) << "kind " << function.kind << " x " << x[i] << ": " << out[i] << " for " << exact;
      }
    }
    const float nan = NAN;
    for (const auto &function : functions) {
      float out = 0.0f;
      activate_rows({&nan, &out, 1, 1, {function.kind, false}});
      CHECK(std::isnan(out)) << "kind " << function.kind << " of NaN: " << out;
    }
  });
}

TEST(gated_activation_over_shapes) {
  testing::for_each_isa([] {
    testing::Random random(1);
    for (int64_t width : {1, 5, 16, 31, 100, 9000}) {
      for (int64_t rows : {0, 1, 4}) {
        const std::vector<float> x = random.normals(rows * width * 2);
        std::vector<float> out(rows * width, NAN);
        std::vector<double> expected(rows * width);
        activate_rows({x.data(), out.data(), rows, width, {Activation::silu, true}});
        for (int64_t i = 0; i < rows * width; ++i) {
          const double gate = x[i / width * 2 * width + i % width];
          expected[i] = gate / (1 + std::exp(-gate)) * x[i / width * 2 * width + width + i % width];
        }
        const double error = testing::max_error(out, expected);
        CHECK(error < 1e-6) << error << " width " << width << " rows " << rows;
      }
    }
  });
}

TEST(half_types_round_trip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const fp16 half{static_cast<uint16_t>(bits)};
    const bf16 brain{static_cast<uint16_t>(bits)};
    fp16 half_back;
    bf16 brain_back;
    from_float(to_float(half), &half_back);
    from_float(to_float(brain), &brain_back);
    const bool half_nan = (bits & 0x7fffu) > 0x7c00u, brain_nan = (bits & 0x7fffu) > 0x7f80u;
    CHECK(half_nan ? std::isnan(to_float(half_back)) : half_back.bits == bits) << "fp16 " << bits;
    CHECK(brain_nan ? std::isnan(to_float(brain_back)) : brain_back.bits == bits) << "bf16 " << bits;
  }
  const struct {
    float value;
    uint16_t half, brain;
  } rounded[] = {{1.0f + 1.0f / 2048, 0x3c00, 0x3f80},  // ties go to even
                 {1.0f + 3.0f / 2048, 0x3c02, 0x3f80},
                 {65519.0f, 0x7bff, 0x4780},
                 {65520.0f, 0x7c00, 0x4780},
                 {1.0f / (1 << 25), 0x0000, 0x3300},
                 {1.5f / (1 << 24), 0x0002, 0x33c0},
                 {-1e30f, 0xfc00, 0xf14a}};
  for (const auto &entry : rounded) {
    fp16 half;
    bf16 brain;
    from_float(entry.value, &half);
    from_float(entry.value, &brain);
    CHECK(half.bits == entry.half) << entry.value << " fp16 " << half.bits;
    CHECK(brain.bits == entry.brain) << entry.value << " bf16 " << brain.bits;
  }
}

TEST(vector_conversions_equal_scalar_ones) {
  testing::for_each_isa([] {
    std::vector<fp16> halves(0x10000);
    std::vector<bf16> brains(0x10000);
    for (uint32_t i = 0; i < 0x10000; ++i) halves[i].bits = brains[i].bits = static_cast<uint16_t>(i);
    std::vector<float> out(0x10000);
    const int64_t id = 0;
    for (DType dtype : {DType::fp16, DType::bf16}) {
      const void *data = dtype == DType::fp16 ? static_cast<const void *>(halves.data()) : brains.data();
      embedding({&id, DType::i64, {data, dtype}, out.data(), 1, 1, 0x10000});
      for (uint32_t i = 0; i < 0x10000; ++i) {
        const float exact = dtype == DType::fp16 ? to_float(halves[i]) : to_float(brains[i]);
        CHECK(float_to_bits(out[i]) == float_to_bits(exact) || (std::isnan(out[i]) && std::isnan(exact)))
            << testing::dtype_name(dtype) << " " << i << ": " << out[i] << " for " << exact;
      }
    }
  });
}

TEST(embedding_of_any_ids) {
  testing::for_each_isa([] {
    testing::Random random(2);
    for (int64_t width : {1, 6, 16, 37}) {
      for (DType dtype : testing::kFloatTypes) {
        const testing::Stored table(random.normals(5 * width), dtype);
        const std::vector<int64_t> ids = {0, 4, -1, 5, 2, INT64_MIN, INT64_MAX, 2};
        std::vector<int32_t> short_ids;
        for (int64_t id : ids) short_ids.push_back(static_cast<int32_t>(std::max<int64_t>(-7, std::min<int64_t>(id, 9))));
        for (DType id_dtype : {DType::i64, DType::i32}) {
          std::vector<float> out(ids.size() * width, NAN);
          const void *data = id_dtype == DType::i64 ? static_cast<const void *>(ids.data()) : short_ids.data();
          embedding({data, id_dtype, table.weight(), out.data(), static_cast<int64_t>(ids.size()), 5, width});
          for (size_t i = 0; i < out.size(); ++i) {
            const int64_t id = ids[i / width];
            const float expected = id >= 0 && id < 5 ? table.floats[id * width + i % width] : 0.0f;
            CHECK(out[i] == expected) << "id " << id << " width " << width << " " << testing::dtype_name(dtype);
          }
        }
      }
    }
  });
}

TEST(binary_broadcasts) {
  testing::for_each_isa([] {
    testing::Random random(3);
    for (int trial = 0; trial < 300; ++trial) {
      BinaryArgs args{};
      args.rank = static_cast<int>(random.below(kMaxBinaryRank + 1));
      int64_t total = 1, x_total = 1, y_total = 1;
      for (int d = args.rank - 1; d >= 0; --d) {
        const int64_t sizes[] = {1, 2, 3, 5, 17, 600};
        args.dims[d] = sizes[random.below(d == args.rank - 1 ? 6 : 4)];
        const bool x_full = random.below(3) > 0, y_full = random.below(3) > 0 || !x_full;
        args.x_strides[d] = x_full && args.dims[d] > 1 ? x_total : 0;
        args.y_strides[d] = y_full && args.dims[d] > 1 ? y_total : 0;
        if (x_full) x_total *= args.dims[d];
        if (y_full) y_total *= args.dims[d];
        total *= args.dims[d];
      }
      args.x_dtype = testing::kFloatTypes[random.below(3)];
      args.y_dtype = testing::kFloatTypes[random.below(3)];
      args.op = static_cast<BinaryOp>(random.below(6));
      const testing::Stored x(random.normals(x_total), args.x_dtype), y(random.normals(y_total), args.y_dtype);
      std::vector<float> out(total, NAN);
      args.x = x.weight().data;
      args.y = y.weight().data;
      args.out = out.data();
      binary(args);
      for (int64_t i = 0; i < total; ++i) {
        int64_t rest = i, x_index = 0, y_index = 0;
        for (int d = args.rank - 1; d >= 0; --d) {
          x_index += rest % args.dims[d] * args.x_strides[d];
          y_index += rest % args.dims[d] * args.y_strides[d];
          rest /= args.dims[d];
        }
        const float a = x.floats[x_index], b = y.floats[y_index];
        const float results[] = {a + b, a - b, a * b, a / b, std::fmax(a, b), std::fmin(a, b)};
        CHECK(out[i] == results[static_cast<int>(args.op)]) << "trial " << trial << " element " << i;
      }
    }
    for (BinaryOp op : {BinaryOp::maximum, BinaryOp::minimum}) {
      const float pair[2] = {NAN, 1.0f}, other[2] = {1.0f, NAN};
      float out[2] = {0.0f, 0.0f};
      binary({pair, other, DType::f32, DType::f32, out, 1, {2}, {1}, {1}, op});
      CHECK(std::isnan(out[0]) && std::isnan(out[1])) << out[0] << " " << out[1];
    }
  });
}

#include "kernels/norm.h"

#include "testing.h"

using namespace vllm_ms;

namespace {

std::vector<double> reference(const std::vector<float> &x, int64_t width, const testing::Stored *weight,
                              const testing::Stored *bias, Norm norm, double eps, double offset) {
  std::vector<double> out(x.size());
  for (size_t start = 0; start < x.size(); start += width) {
    double mean = 0.0, square = 0.0;
    if (norm == Norm::layer) {
      for (int64_t i = 0; i < width; ++i) mean += x[start + i] / static_cast<double>(width);
    }
    for (int64_t i = 0; i < width; ++i) square += (x[start + i] - mean) * (x[start + i] - mean) / width;
    for (int64_t i = 0; i < width; ++i) {
      double v = (x[start + i] - mean) / std::sqrt(square + eps);
      if (weight != nullptr) v *= (*weight)[i] + offset;
      if (bias != nullptr) v += (*bias)[i];
      out[start + i] = v;
    }
  }
  return out;
}

}  // namespace

TEST(norm_against_float64) {
  testing::for_each_isa([] {
    testing::Random random(1);
    for (int64_t width : {1, 3, 4, 7, 16, 31, 33, 64, 127, 896, 1025}) {
      for (int64_t rows : {0, 1, 3, 40}) {
        for (DType dtype : testing::kFloatTypes) {
          for (Norm norm : {Norm::rms, Norm::layer}) {
            for (bool weighted : {false, true}) {
              const std::vector<float> x = random.normals(rows * width, 3.0f);
              const testing::Stored weight(random.normals(width), dtype), bias(random.normals(width), dtype);
              const float offset = norm == Norm::rms ? 1.0f : 0.0f, eps = 1e-5f;
              std::vector<float> out(x.size(), NAN);
              norm_rows({x.data(), out.data(), rows, width, weighted ? weight.weight() : Weight{},
                         weighted && norm == Norm::layer ? bias.weight() : Weight{}, norm, eps, offset});
              const auto expected = reference(x, width, weighted ? &weight : nullptr,
                                              weighted && norm == Norm::layer ? &bias : nullptr, norm, eps, offset);
              const double error = testing::max_error(out, expected);
              CHECK(error < 2e-6) << error << " width " << width << " rows " << rows << " "
                                  << testing::dtype_name(dtype) << (norm == Norm::rms ? " rms" : " layer");
            }
          }
        }
      }
    }
  });
}

TEST(layer_norm_of_large_mean) {
  testing::for_each_isa([] {
    testing::Random random(2);
    std::vector<float> x = random.normals(1000);
    for (float &v : x) v += 1000.0f;
    std::vector<float> out(x.size());
    norm_rows({x.data(), out.data(), 1, 1000, {}, {}, Norm::layer, 1e-5f, 0.0f});
    const double error = testing::max_error(out, reference(x, 1000, nullptr, nullptr, Norm::layer, 1e-5, 0.0));
    CHECK(error < 1e-4) << error;
  });
}

TEST(norm_row_bits_do_not_depend_on_the_batch) {
  testing::for_each_isa([] {
    testing::Random random(3);
    const int64_t width = 333, rows = 200;
    const std::vector<float> x = random.normals(rows * width);
    std::vector<float> together(x.size()), alone(width);
    norm_rows({x.data(), together.data(), rows, width, {}, {}, Norm::rms, 1e-6f, 0.0f});
    for (int64_t r = 0; r < rows; ++r) {
      norm_rows({x.data() + r * width, alone.data(), 1, width, {}, {}, Norm::rms, 1e-6f, 0.0f});
      CHECK(testing::same_bits(alone.data(), together.data() + r * width, width)) << "row " << r;
    }
  });
}

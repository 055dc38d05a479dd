// A test driver in one header: TEST(name) { CHECK(condition) << "what"; }, for_each_isa, and float64 comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "dtype.h"
#include "isa.h"
#include "parallel.h"

namespace testing {

struct Test {
  const char *name;
  void (*body)();
};

inline std::vector<Test> &tests() {
  static std::vector<Test> all;
  return all;
}

struct Registrar {
  Registrar(const char *name, void (*body)()) { tests().push_back({name, body}); }
};

inline int &failures() {
  static int count = 0;
  return count;
}

// Collects a message with <<; prints it when it goes out of scope, if the check failed.
class Report {
 public:
  Report(bool ok, const char *file, int line, const char *text) : ok_(ok) {
    if (!ok_) message_ << file << ":" << line << ": " << vllm_ms::isa_name(vllm_ms::isa()) << ": " << text << ": ";
  }
  ~Report() {
    if (ok_) return;
    if (++failures() <= 50) std::fprintf(stderr, "%s\n", message_.str().c_str());
  }
  template <class T>
  Report &operator<<(const T &value) {
    if (!ok_) message_ << value;
    return *this;
  }

 private:
  bool ok_;
  std::ostringstream message_;
};

#define TEST(name)                                                 \
  static void test_##name();                                       \
  static const testing::Registrar registrar_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) testing::Report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

// Runs `body` once per instruction-set variant that this CPU has.
inline void for_each_isa(const std::function<void()> &body) {
  const vllm_ms::Isa before = vllm_ms::isa();
  for (vllm_ms::Isa isa : {vllm_ms::Isa::portable, vllm_ms::Isa::avx2, vllm_ms::Isa::avx512, vllm_ms::Isa::amx}) {
    if (!vllm_ms::isa_supported(isa)) continue;
    vllm_ms::set_isa(isa);
    body();
  }
  vllm_ms::set_isa(before);
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint32_t>(n)); }
  std::vector<float> normals(int64_t n, float scale = 1.0f) {
    std::vector<float> values(n);
    for (float &v : values) v = normal() * scale;
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Values stored as `dtype`, with what they are as floats. The buffer has exactly n elements, so that an over-read shows
// under a sanitizer.
class Stored {
 public:
  Stored(const std::vector<float> &values, vllm_ms::DType dtype) : dtype_(dtype), floats(values) {
    const int64_t size = vllm_ms::dtype_size(dtype);
    bytes_.resize(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
      char *out = bytes_.data() + i * size;
      if (dtype == vllm_ms::DType::bf16) {
        put<vllm_ms::bf16>(values[i], out, &floats[i]);
      } else if (dtype == vllm_ms::DType::fp16) {
        put<vllm_ms::fp16>(values[i], out, &floats[i]);
      } else {
        put<float>(values[i], out, &floats[i]);
      }
    }
  }
  vllm_ms::Weight weight() const { return {bytes_.data(), dtype_}; }
  void *data() { return bytes_.data(); }
  double operator[](int64_t i) const { return floats[i]; }

 private:
  template <class T>
  static void put(float value, char *out, float *back) {
    T stored;
    vllm_ms::from_float(value, &stored);
    std::memcpy(out, &stored, sizeof(stored));
    *back = vllm_ms::to_float(stored);
  }
  vllm_ms::DType dtype_;
  std::vector<char> bytes_;

 public:
  std::vector<float> floats;  // after rounding to the storage type
};

constexpr vllm_ms::DType kFloatTypes[] = {vllm_ms::DType::f32, vllm_ms::DType::bf16, vllm_ms::DType::fp16};

inline const char *dtype_name(vllm_ms::DType dtype) {
  return dtype == vllm_ms::DType::bf16 ? "bf16" : dtype == vllm_ms::DType::fp16 ? "fp16" : "f32";
}

// Largest |a - b| / (1 + |b|); NaN in either counts as infinite.
inline double max_error(const std::vector<float> &actual, const std::vector<double> &expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double worst = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(actual[i] - expected[i]) / (1.0 + std::fabs(expected[i]));
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}

inline bool same_bits(const float *a, const float *b, int64_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

}  // namespace testing

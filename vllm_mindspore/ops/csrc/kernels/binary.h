#pragma once

#include <cstdint>
#include <cstring>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

constexpr int kMaxBinaryRank = 5;

enum class BinaryOp : int32_t { add, sub, mul, div, maximum, minimum };

inline bool parse_binary_op(const char *text, BinaryOp *out) {
  static constexpr const char *kNames[] = {"add", "sub", "mul", "div", "maximum", "minimum"};
  for (int i = 0; i < 6; ++i) {
    if (std::strcmp(kNames[i], text) != 0) continue;
    *out = static_cast<BinaryOp>(i);
    return true;
  }
  return false;
}

// out = x op y with broadcasting. `dims` is out's shape; the strides, in elements, are 0 along broadcast dimensions.
// maximum and minimum give NaN where either operand is NaN.
struct BinaryArgs {
  const void *x, *y;
  DType x_dtype, y_dtype;  // f32, bf16 or fp16
  float *out;
  int rank;
  int64_t dims[kMaxBinaryRank], x_strides[kMaxBinaryRank], y_strides[kMaxBinaryRank];
  BinaryOp op;
};

VLLM_MS_DECLARE_KERNEL(binary, BinaryArgs)

}  // namespace vllm_ms

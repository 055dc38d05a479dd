#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

enum class Norm : int32_t { none, rms, layer };

// out[r, :] = normalised x[r, :]; `out` may be `x`.
//   rms:   x / sqrt(mean(x^2) + eps) * (weight + offset)
//   layer: (x - mean) / sqrt(var + eps) * weight + bias
struct NormArgs {
  const float *x;
  float *out;
  int64_t rows, width;
  Weight weight, bias;  // [width], optional
  Norm norm;
  float eps, offset;
};

VLLM_MS_DECLARE_KERNEL(norm_rows, NormArgs)

}  // namespace vllm_ms

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"
#include "activation.h"
#include "norm.h"

namespace vllm_ms {

// out = act(norm(x) W^T + bias) + residual, x [m, k], W [n, k] row by row as vLLM keeps it, or in columns (columns.h).
// With a gated activation W's rows are [gate; up] and out is [m, n / 2] = act(gate) * up (+ residual).
//
// A row of `out` has the same bits whatever m is: the products of row and weight row are always summed in the same
// order, first into the lanes of one vector with k ascending, then across the lanes; in columns with k ascending.
struct LinearArgs {
  const float *x;
  Weight weight, bias;    // [n, k], [n]
  const float *residual;  // of out's shape, or null
  float *out;
  int64_t m, n, k;
  Activation activation;
  Norm norm;
  Weight norm_weight, norm_bias;  // [k]
  float eps, norm_offset;
};

VLLM_MS_DECLARE_KERNEL(linear, LinearArgs)

}  // namespace vllm_ms

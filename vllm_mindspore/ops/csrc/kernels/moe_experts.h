#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"
#include "activation.h"
#include "norm.h"

namespace vllm_ms {

// out[t] = sum over j of weight[t, j] * down(act(gate_up(norm(x[t])))) of expert id[t, j], in the order of j, + residual.
//
// An expert that no token has costs nothing, and an id outside of [0, experts) contributes nothing. A row of `out` has
// the same bits whatever the other rows are: products are summed as in linear.h.
struct MoeExpertsArgs {
  const float *x;        // [tokens, hidden]
  const float *routing;  // [tokens, 2 * top_k], as moe_route.h writes it
  Weight w13, w2;        // [experts, rows13, hidden], [experts, width, inter], of one dtype
  Weight w13_bias, w2_bias;  // [experts, rows13], [experts, width]
  const float *residual;     // [tokens, width], or null
  float *out;                // [tokens, width]
  int64_t tokens, top_k, experts, hidden, inter, width;

  // The rows of w13 are [gate; up] for a gated activation, or gate, up, gate, up ... when interleaved; rows13 is
  // 2 * inter then, else inter.
  Activation activation;
  bool interleaved;
  // Of a gated silu: min(gate, limit) sigmoid(alpha min(gate, limit)) (clamp(up, -limit, limit) + beta).
  bool clamped;
  float alpha, beta, limit;
  bool weight_on_input;  // scale x, not the result: top_k is 1

  Norm norm;
  Weight norm_weight, norm_bias;  // [hidden]
  float eps, norm_offset;
};

VLLM_MS_DECLARE_KERNEL(moe_experts, MoeExpertsArgs)

}  // namespace vllm_ms

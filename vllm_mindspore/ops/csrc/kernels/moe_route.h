#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

enum class Scoring : int32_t { softmax, sigmoid };

// Top-k routing: out [rows, 2 * top_k] are the ids of the chosen experts, best first, then their weights.
//
// Scores are softmax or sigmoid of the logits. Experts are chosen by score + bias, of equal ones the lower id; with
// groups > 1 only among the experts of the best `topk_groups` groups, where a group's worth is its best expert's or, with
// a bias, the sum of its two best. If `balanced`, every one of those groups gives as many of its best experts as any other.
// Weights are the scores without bias, divided by their sum if `renormalize`, times `scale` and the expert's
// `expert_scale`. NaN is chosen last: the ids are always top_k different experts.
struct MoeRouteArgs {
  const float *logits;  // [rows, experts]
  Weight bias;          // [experts], or none
  Weight expert_scale;  // [experts], or none
  float *out;
  int64_t rows, experts, top_k;
  Scoring scoring;
  bool renormalize;
  int64_t groups, topk_groups;  // experts is a multiple of groups; top_k experts fit into topk_groups of them
  bool balanced;                // top_k is then a multiple of topk_groups
  float scale;
};

VLLM_MS_DECLARE_KERNEL(moe_route, MoeRouteArgs)

}  // namespace vllm_ms

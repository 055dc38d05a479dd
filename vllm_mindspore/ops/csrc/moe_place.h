// Which experts tokens chose, and where these are.
#pragma once

#include <cstdint>

namespace vllm_ms {

// routing [tokens, 2 * top_k] as moe_route.h writes it: ids, then weights. An id outside of [0, experts) is no expert.

// out[e] = the tokens that chose expert e, of `experts`.
void moe_count(const float *routing, int64_t tokens, int64_t top_k, int64_t experts, float *out);

// The same routing with places for ids, -1 for no expert. map [experts, replicas]: the places that have an expert, then -1.
// Of several, tokens take the next one in turn.
void moe_place(const float *routing, int64_t tokens, int64_t top_k, const int32_t *map, int64_t experts,
               int64_t replicas, float *out);

// The same routing with ids relative to `first`, -1 where they are not in [first, first + count).
void moe_local(const float *routing, int64_t tokens, int64_t top_k, int64_t first, int64_t count, float *out);

}  // namespace vllm_ms

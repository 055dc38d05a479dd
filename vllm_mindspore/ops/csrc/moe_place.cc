#include "moe_place.h"

#include <algorithm>

namespace vllm_ms {
namespace {

// out: routing with f(token, id) for each id, -1 where that is not in [0, limit).
template <class F>
void replace_ids(const float *routing, int64_t tokens, int64_t top_k, int64_t limit, float *out, F f) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float *ids = routing + t * 2 * top_k;
    float *to = out + t * 2 * top_k;
    for (int64_t j = 0; j < top_k; ++j) {
      const bool is_one = ids[j] >= 0.0f && ids[j] < static_cast<float>(limit);
      to[j] = is_one ? static_cast<float>(f(t, static_cast<int64_t>(ids[j]))) : -1.0f;
    }
    std::copy_n(ids + top_k, top_k, to + top_k);
  }
}

}  // namespace

void moe_count(const float *routing, int64_t tokens, int64_t top_k, int64_t experts, float *out) {
  std::fill_n(out, experts, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const float *ids = routing + t * 2 * top_k;
    for (int64_t j = 0; j < top_k; ++j) {
      if (ids[j] >= 0.0f && ids[j] < static_cast<float>(experts)) out[static_cast<int64_t>(ids[j])] += 1.0f;
    }
  }
}

void moe_place(const float *routing, int64_t tokens, int64_t top_k, const int32_t *map, int64_t experts,
               int64_t replicas, float *out) {
  replace_ids(routing, tokens, top_k, experts, out, [&](int64_t token, int64_t expert) {
    const int32_t *places = map + expert * replicas;
    const int64_t count = std::find_if(places, places + replicas, [](int32_t place) { return place < 0; }) - places;
    return count > 0 ? places[token % count] : -1;
  });
}

void moe_local(const float *routing, int64_t tokens, int64_t top_k, int64_t first, int64_t count, float *out) {
  replace_ids(routing, tokens, top_k, first + count, out, [&](int64_t, int64_t id) {
    return id >= first ? id - first : -1;
  });
}

}  // namespace vllm_ms

// The two forms of multi-head latent attention: division into tasks, and their execution on the thread pool.
#pragma once

#include <vector>

#include "kernels/mla.h"

namespace vllm_ms {

constexpr int64_t kAbsorbedTokens = 64;  // at once: bounds what queries and sums in latent form take

// A query in absorbed form.
struct MlaQuery {
  int64_t request, token, num_keys;
  const float *selected;  // positions of its keys; null: the first num_keys
};

// The first `queries` of a request's queries in the step, which see its first `keys` keys, in expanded form.
struct MlaPart {
  int64_t request, queries, keys;
  const uint64_t *mask;  // [queries, mla_tiles(keys)]: a bit for each key that a query attends to; null: to all it sees
};

// Up to kAbsorbedTokens queries.
void attend_absorbed(const MlaInputs &in, const std::vector<MlaQuery> &queries);

// A block of the contexts at a time.
void attend_expanded(const MlaInputs &in, const std::vector<MlaPart> &parts);

}  // namespace vllm_ms

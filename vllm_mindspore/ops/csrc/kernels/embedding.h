#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

// out[t, :] = weight[ids[t] - first, :]; zeros where that is not in [0, vocabulary).
struct EmbeddingArgs {
  const void *ids;
  DType id_dtype;  // i32 or i64
  Weight weight;   // [vocabulary, width]
  float *out;
  int64_t tokens, vocabulary, width;
  int64_t first = 0;  // the id of the first row
};

VLLM_MS_DECLARE_KERNEL(embedding, EmbeddingArgs)

}  // namespace vllm_ms

#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

// out[t, :] = weight[ids[t], :]; zeros where the id is not in [0, vocabulary).
struct EmbeddingArgs {
  const void *ids;
  DType id_dtype;  // i32 or i64
  Weight weight;   // [vocabulary, width]
  float *out;
  int64_t tokens, vocabulary, width;
};

VLLM_MS_DECLARE_KERNEL(embedding, EmbeddingArgs)

}  // namespace vllm_ms

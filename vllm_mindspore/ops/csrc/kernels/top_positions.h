// The positions of the largest values of a row.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace vllm_ms {

// out: the positions of the top_k largest of `size` scores, ascending; of equal ones the lower positions, NaN last.
// size >= top_k > 0, and below 2^24, so that positions are exact as float.
struct TopPositionsArgs {
  const float *scores;
  int64_t size, top_k;
  float *out;
  uint32_t *workspace;  // 2 * size
};
VLLM_MS_DECLARE_KERNEL(top_positions, TopPositionsArgs)

}  // namespace vllm_ms

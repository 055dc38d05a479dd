#pragma once

#include <cstdint>

#include "../isa.h"

namespace vllm_ms {

// Rows of logits; row r begins at data + r * stride.
struct LogitRows {
  const float *data;
  int64_t rows, vocab, stride;
};

// out[r] = the index of the largest logit, the lowest one among equals; of the first NaN if there is one.
struct ArgmaxArgs {
  LogitRows logits;
  int64_t *out;  // [rows]
};

// out[r] = a token drawn from the softmax of row r, restricted to
//   top_k: the logits that are not below the k-th largest (k < 1 or k >= vocab: all), and of their softmax
//   top_p: the fewest tokens, the most probable first and the lower index first among equals, whose probabilities sum
//          to p or more; at least one (p >= 1: all)
// by inverting the distribution function over the kept tokens in the order of the vocabulary at uniform[r]. A logit more
// than 80 below the row's largest has probability zero. A row that has no softmax (NaN, +inf, nothing but -inf) gives its
// argmax. A token depends on its row and its parameters alone, not on other rows or threads.
struct SampleArgs {
  LogitRows logits;
  const int32_t *top_k;   // [rows], optional
  const float *top_p;     // [rows], optional
  const double *uniform;  // [rows], in [0, 1)
  int64_t *out;           // [rows]
};

VLLM_MS_DECLARE_KERNEL(argmax_rows, ArgmaxArgs)
VLLM_MS_DECLARE_KERNEL(sample_rows, SampleArgs)

}  // namespace vllm_ms

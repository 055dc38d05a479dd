// Rotary position embedding, and the norm that some models apply to each query and key head before it.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace vllm_ms {

enum class HeadNorm : int32_t { none, head, full };  // none; RMS over one head; RMS over all heads of a token

// What happens to one head of a query or key between the projection and attention. head_size is in elements.
struct HeadTransform {
  int64_t head_size = 0;

  HeadNorm norm = HeadNorm::none;
  Weight norm_weight;                // head: [head_size]; full: [num_heads * head_size]; gamma = weight + norm_offset
  float norm_eps = 0;
  float norm_offset = 0;
  const float *inverse_rms = nullptr;  // full only: [num_tokens], from inverse_rms_tokens

  const int64_t *positions = nullptr;  // [num_tokens], checked against cos_sin by the caller
  Weight cos_sin;                      // [max_position, rotary_dim]: cosines, then sines; absent: no rotation
  int64_t rotary_dim = 0;              // even, <= head_size; the rest of the head passes through
  bool neox = true;                    // pairs (i, i + rotary_dim/2); otherwise (2i, 2i + 1)
};

// out[token, head] = transform(x[token, head]) for tokens [begin, end). Strides in floats between tokens. x may be out.
struct TransformHeadsArgs {
  HeadTransform transform;
  const float *x;
  int64_t x_stride;
  float *out;
  int64_t out_stride;
  int64_t num_heads;
  int64_t begin;
  int64_t end;
};
VLLM_MS_DECLARE_KERNEL(transform_heads, TransformHeadsArgs)

// out[token] = 1 / sqrt(mean(x[token, 0:size]^2) + eps) for tokens [begin, end).
struct InverseRmsArgs {
  const float *x;
  int64_t stride;
  int64_t size;
  float eps;
  float *out;
  int64_t begin;
  int64_t end;
};
VLLM_MS_DECLARE_KERNEL(inverse_rms_tokens, InverseRmsArgs)

}  // namespace vllm_ms

// Writing keys and values into the paged KV cache.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace vllm_ms {

// A layer's cache, [num_slots, num_kv_heads, head_size + value_size]: the key, then the value, of a slot and head. In
// attention values are not wider than keys.
struct KvCache {
  void *data = nullptr;
  DType dtype = DType::f32;  // f32, bf16 or fp16
  int64_t num_slots = 0;
  int64_t num_kv_heads = 0;
  int64_t head_size = 0;
  int64_t value_size = 0;
};

VLLM_MS_INLINE int64_t row_size(const KvCache &cache) { return cache.head_size + cache.value_size; }

// Writes tokens [begin, end). Slots outside [0, num_slots) are skipped.
struct KvWriteArgs {
  KvCache cache;
  const float *key;  // head h of token t at key + t * key_stride + h * head_size
  int64_t key_stride;
  const float *value;  // at value + t * value_stride + h * value_size
  int64_t value_stride;
  const int64_t *slot_mapping;         // [num_tokens]
  const HeadTransform *key_transform;  // norm and rotation on the way; null for none
  float *workspace;                    // [head_size], needed with key_transform
  int64_t begin;
  int64_t end;
};
VLLM_MS_DECLARE_KERNEL(kv_write_tokens, KvWriteArgs)

}  // namespace vllm_ms

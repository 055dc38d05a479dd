#include "kv_cache.h"

#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kTokensAhead = 1;

template <class T>
void write_tokens(const KvWriteArgs &args) {
  const int64_t size = args.cache.head_size, value_size = args.cache.value_size, heads = args.cache.num_kv_heads;
  for (int64_t token = args.begin; token < args.end; ++token) {
    const int64_t slot = args.slot_mapping[token];
    if (slot < 0 || slot >= args.cache.num_slots) continue;
    const float *keys = args.key + token * args.key_stride, *values = args.value + token * args.value_stride;
    for (int64_t head = 0; head < heads; ++head) {
      const float *key = keys + head * size, *value = values + head * value_size;
      if (token + kTokensAhead < args.end) {
        prefetch_row(key + kTokensAhead * args.key_stride, size);
        prefetch_row(value + kTokensAhead * args.value_stride, value_size);
      }
      if (args.key_transform != nullptr) {
        transform_head(*args.key_transform, token, head, key, args.workspace);
        key = args.workspace;
      }
      T *row = static_cast<T *>(args.cache.data) + (slot * heads + head) * row_size(args.cache);
      convert(key, size, row);
      convert(value, value_size, row + size);
    }
  }
}

}  // namespace

void kv_write_tokens(const KvWriteArgs &args) {
  VLLM_MS_DISPATCH_FLOAT(args.cache.dtype, T, { write_tokens<T>(args); })
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

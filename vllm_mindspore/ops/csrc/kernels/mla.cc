// Between the projections and attention: the cache's rows, and queries in latent form.
#include "mla.h"

#include "attention_tile.h"
#include "mla_dot.h"
#include "mla_rows.h"
#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kDirectTokens = 8;    // more tokens than this read a weight's rows through a float copy
constexpr int64_t kStreamedTokens = 2;  // more tokens than this read them through a copy in pairs

template <class T>
void write_tokens(const MlaWriteArgs &args) {
  for (int64_t token = args.begin; token < args.end; ++token) {
    const int64_t slot = args.slot_mapping[token];
    if (slot < 0 || slot >= args.num_slots) continue;
    const float *latent = args.kv_c + token * args.kv_c_stride, *k_pe = args.k_pe + token * args.k_pe_stride;
    if (args.norm != nullptr) {
      transform_head(*args.norm, token, 0, latent, args.workspace);
      latent = args.workspace;
    }
    if (args.rotation != nullptr) {
      transform_head(*args.rotation, token, 0, k_pe, args.workspace + args.lora);
      k_pe = args.workspace + args.lora;
    }
    T *row = static_cast<T *>(args.cache) + slot * (args.lora + args.rope);
    convert(latent, args.lora, row);
    convert(k_pe, args.rope, row + args.lora);
  }
}

// The latent part of one head's queries: out[i] += q_nope[i] W_k, rows of W_k taken kTileKeys at a time.
template <class T>
void absorb_rows(const MlaAbsorbArgs &args, int64_t head, int64_t stride, float *weights, float *converted) {
  const MlaInputs &in = *args.inputs;
  const int64_t padded = padded_head(in.lora), size = in.nope + in.rope;
  const T *keys = static_cast<const T *>(mla_head_weight(in, head));
  const bool direct = in.lora % kLanes == 0 && (sizeof(T) == sizeof(float) || args.count <= kDirectTokens);
  const void *rows[kTileKeys];
  const char *ahead[kTileKeys];
  float *out = args.out + head * padded_head(mla_row(in));
  for (int64_t begin = 0; begin < in.nope; begin += kTileKeys) {
    const int64_t count = min_of(kTileKeys, in.nope - begin);
    for (int64_t j = 0; j < count; ++j) {
      const T *row = keys + (begin + j) * in.lora;
      ahead[j] = reinterpret_cast<const char *>(begin + kTileKeys < in.nope ? row + kTileKeys * in.lora : row);
      rows[j] = direct ? static_cast<const void *>(row) : converted + j * padded;
      if (!direct) convert_row(row, in.lora, converted + j * padded);
    }
    for (int64_t i = 0; i < args.count; ++i) {
      const float *query = in.step.query + args.tokens[i] * in.step.query_stride + head * size + begin;
      std::memcpy(weights + i * kTileKeys, query, count * sizeof(float));
    }
    for_row_groups(args.count, [&](auto R, int64_t i) {
      const Ahead next{ahead, 0, direct && i == 0 ? static_cast<int64_t>(in.lora * sizeof(T)) : 0};
      if (direct) {
        accumulate_rows<R.value, T>(out + i * stride, stride, weights + i * kTileKeys, rows, 0, count, in.lora, next);
      } else {
        accumulate_rows<R.value, float>(out + i * stride, stride, weights + i * kTileKeys, rows, 0, count, in.lora,
                                        next);
      }
    });
  }
}

#if defined(__AVX512BF16__)
// As absorb_pairs for few tokens: rows go straight from memory to the sums, which stay in the first-level cache.
VLLM_MS_NOINLINE void absorb_streamed(const MlaAbsorbArgs &args, int64_t head, int64_t stride) {
  const MlaInputs &in = *args.inputs;
  constexpr int64_t kAhead = 8;  // rows
  const int64_t size = in.nope + in.rope;
  const bf16 *keys = static_cast<const bf16 *>(mla_head_weight(in, head));
  float *out = args.out + head * padded_head(mla_row(in));
  const Pairing pairing;
  for (int64_t j = 0; j < in.nope; j += 2) {
    const bf16 *even = keys + j * in.lora, *odd = even + in.lora;
    __m512bh weights[kStreamedTokens];
    for (int64_t i = 0; i < args.count; ++i) {
      const float *query = in.step.query + args.tokens[i] * in.step.query_stride + head * size + j;
      bf16 rounded[2];
      convert(query, 2, rounded);
      weights[i] = repeat_pair(rounded);
    }
    for (int64_t d = 0; d < in.lora; d += kPairs) {
      __builtin_prefetch(even + kAhead * in.lora + d, 0, 2);
      __builtin_prefetch(odd + kAhead * in.lora + d, 0, 2);
      __m512i pairs[2];
      pairing.pair(even + d, odd + d, pairs);
      for (int64_t i = 0; i < args.count; ++i) {
        float *sums = out + i * stride + d;
        for (int64_t n = 0; n < 2; ++n) {
          float *sum = sums + n * kLanes;
          store(sum, dot_pairs(weights[i], reinterpret_cast<__m512bh>(pairs[n]), load(sum)));
        }
      }
    }
  }
}

// As absorb_rows, by bf16 dot products: the queries are rounded, rows of W_k are taken in pairs.
VLLM_MS_NOINLINE void absorb_pairs(const MlaAbsorbArgs &args, int64_t head, int64_t stride, bf16 *weights,
                                   bf16 *values) {
  const MlaInputs &in = *args.inputs;
  const int64_t size = in.nope + in.rope;
  const bf16 *keys = static_cast<const bf16 *>(mla_head_weight(in, head));
  const void *rows[kTileKeys];
  const char *ahead[kTileKeys];
  float *out = args.out + head * padded_head(mla_row(in));
  for (int64_t begin = 0; begin < in.nope; begin += kTileKeys) {
    const int64_t count = min_of(kTileKeys, in.nope - begin), next = begin + kTileKeys;
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = keys + (begin + j) * in.lora;
      ahead[j] = reinterpret_cast<const char *>(keys + (next + j < in.nope ? next + j : begin + j) * in.lora);
    }
    pair_values(rows, count, in.lora, values);
    for (int64_t i = 0; i < args.count; ++i) {
      const float *query = in.step.query + args.tokens[i] * in.step.query_stride + head * size + begin;
      convert(query, count, weights + i * kTileKeys);
    }
    accumulate_dot(out, stride, args.count, weights, values, count, in.lora, {ahead, 0, 2 * in.lora});
  }
}

#endif

void absorb_head(const MlaAbsorbArgs &args, int64_t head, int64_t stride, float *weights, float *converted) {
  const MlaInputs &in = *args.inputs;
#if defined(__AVX512BF16__)
  if (expands_to_pairs(in) && in.lora % kPairs == 0 && in.nope % 2 == 0) {
    if (args.count <= kStreamedTokens) return absorb_streamed(args, head, stride);
    return absorb_pairs(args, head, stride, reinterpret_cast<bf16 *>(weights), reinterpret_cast<bf16 *>(converted));
  }
#endif
  VLLM_MS_DISPATCH_FLOAT(in.kv_b.dtype, T, { absorb_rows<T>(args, head, stride, weights, converted); })
}

}  // namespace

void mla_write_tokens(const MlaWriteArgs &args) {
  VLLM_MS_DISPATCH_FLOAT(args.dtype, T, { write_tokens<T>(args); })
}

void mla_absorb(const MlaAbsorbArgs &args) {
  const MlaInputs &in = *args.inputs;
  const int64_t padded = padded_head(mla_row(in)), stride = in.step.num_heads * padded, size = in.nope + in.rope;
  float *weights = args.workspace, *converted = weights + kTileKeys * args.count;
  float *rotated = converted + kTileKeys * padded_head(in.lora);
  for (int64_t head = args.first_head; head < args.end_head; ++head) {
    for (int64_t i = 0; i < args.count; ++i) {
      std::memset(args.out + i * stride + head * padded, 0, padded * sizeof(float));
    }
    absorb_head(args, head, stride, weights, converted);
    for (int64_t i = 0; i < args.count; ++i) {
      const float *q_pe = in.step.query + args.tokens[i] * in.step.query_stride + head * size + in.nope;
      if (in.step.query_transform != nullptr) {
        transform_head(*in.step.query_transform, args.tokens[i], head, q_pe, rotated);
        q_pe = rotated;
      }
      float *out = args.out + i * stride + head * padded + in.lora;
      std::memcpy(out, q_pe, in.rope * sizeof(float));
      std::memset(out + in.rope, 0, (padded - mla_row(in)) * sizeof(float));
    }
  }
}

void mla_gather(const MlaGatherArgs &args) {
  const MlaInputs &in = *args.inputs;
  const MlaSegment &segment = *args.segment;
  int64_t slots[kTileKeys];
  for (int64_t begin = args.begin; begin < args.end; begin += kTileKeys) {
    const int64_t count = min_of(kTileKeys, args.end - begin), first = segment.row + begin - segment.begin;
    find_slots(in.step, segment.request, begin, begin + count, slots);
    VLLM_MS_DISPATCH_FLOAT(in.step.cache.dtype, T, {
      for (int64_t j = 0; j < count; ++j) {
        const T *row = static_cast<const T *>(in.step.cache.data) + slots[j] * mla_row(in);
        widen_exactly(row, in.lora, args.latents + (first + j) * in.lora);
        widen_exactly(row + in.lora, in.rope, args.k_pe + (first + j) * in.rope);
      }
    })
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

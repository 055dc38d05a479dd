// Multi-head latent attention: the parts compiled per instruction set. What is computed in which form, and the division
// of a step into tasks, is in ../mla_plan.h; ../../mla.py says what the operator means.
//
// Numerical contract. Which form a request takes depends on its numbers of queries and keys only. Absorbed: as in
// attention.h, with a query's latent form (a chain of fma over nope_dim) against tiles of kTileKeys absolute positions,
// folded every kSplitKeys positions; where positions are selected, they are counted in the order they are listed in.
// Expanded: keys and values of a position are products whose bits do not depend on
// the positions beside it; a row's online softmax goes over tiles of kTileKeys absolute positions, ascending. In both,
// which rows share a task and where the context is cut into blocks changes no bit of a result.
#pragma once

#include <cstdint>

#include "attention.h"

namespace vllm_ms {

// One step of one layer. Everything is checked (see check_mla) before a kernel sees it.
struct MlaInputs {
  // query: [num_tokens, num_heads, nope + rope]; query_transform: of the last `rope` elements of a head; cache: rows
  // [lora + rope] of one head; out: [num_tokens, num_heads * v].
  AttentionInputs step;
  Weight kv_b;  // [num_heads, nope + v, lora]
  int64_t nope, rope, v, lora;
  // [num_tokens, top_k]: positions that a token with more than top_k keys attends to, instead of all. Null: all tokens
  // attend to all their keys.
  const float *selected;
  int64_t top_k;
};

VLLM_MS_INLINE int64_t mla_row(const MlaInputs &in) { return in.lora + in.rope; }
VLLM_MS_INLINE const void *mla_head_weight(const MlaInputs &in, int64_t head) {
  return static_cast<const char *>(in.kv_b.data) + head * (in.nope + in.v) * in.lora * dtype_size(in.kv_b.dtype);
}

// Writes the latents and shared key parts of tokens [begin, end) into the cache. Slots outside of it are skipped.
struct MlaWriteArgs {
  void *cache;  // [num_slots, lora + rope]
  DType dtype;
  int64_t num_slots, lora, rope;
  const float *kv_c, *k_pe;  // of token t at kv_c + t * kv_c_stride, k_pe + t * k_pe_stride
  int64_t kv_c_stride, k_pe_stride;
  const int64_t *slot_mapping;
  const HeadTransform *norm, *rotation;  // of kv_c and of k_pe; null for none
  float *workspace;                      // [lora + rope]
  int64_t begin, end;
};
VLLM_MS_DECLARE_KERNEL(mla_write_tokens, MlaWriteArgs)

// Queries of heads [first_head, end_head) in the form that attends to latents: for the i-th of `count` tokens
// out[i, head] = [q_nope W_k, q_pe, zeros], padded_head(lora + rope) floats.
struct MlaAbsorbArgs {
  const MlaInputs *inputs;
  const int64_t *tokens;
  int64_t count, first_head, end_head;
  float *out;        // [count, num_heads, padded_head(lora + rope)]
  float *workspace;  // mla_absorb_workspace floats
};
VLLM_MS_DECLARE_KERNEL(mla_absorb, MlaAbsorbArgs)
VLLM_MS_INLINE int64_t mla_absorb_workspace(const MlaInputs &in, int64_t count) {
  return kTileKeys * (count + padded_head(in.lora)) + padded_head(in.rope);
}

// Heads [first_head, first_head + num_heads) of one absorbed query against keys [key_begin, key_end) of its request.
struct MlaTask {
  int64_t index;  // of the query among the absorbed ones
  int64_t request;
  const float *selected;  // positions that stand for keys [0, top_k); null: keys are positions
  int64_t first_head, num_heads;
  int64_t key_begin, key_end;  // bounds of splits, or the query's last key + 1
  float *partial;  // null: write the result; else the states [splits, num_heads, attention_state(lora)] for mla_merge
};

struct MlaTaskArgs {
  const MlaInputs *inputs;
  const MlaTask *task;
  const MlaTask *next;  // what this thread is likely to do after it, to prefetch; or the same
  const float *query;  // what mla_absorb wrote
  float *out;          // [num_heads of the layer, count, lora]: sums of latents
  int64_t count;
  float *workspace;  // mla_workspace floats, 64-byte aligned
};
VLLM_MS_DECLARE_KERNEL(mla_attend, MlaTaskArgs)
// Folds the states of all splits of the task's heads, ascending; as merge_attention.
VLLM_MS_DECLARE_KERNEL(mla_merge, MlaTaskArgs)
VLLM_MS_INLINE int64_t mla_workspace(const MlaInputs &in, int64_t rows) {
  const int64_t row = padded_head(in.lora + in.rope);
  return rows * (row + 2 * padded_head(in.lora) + 2 * kTileKeys + 4) + (kTileKeys + 1) * row + 8 * kRowAlignment;
}

VLLM_MS_INLINE int64_t mla_tiles(int64_t keys) { return (keys + kTileKeys - 1) / kTileKeys; }

// Positions [begin, end) of a request, bounds of tiles or its last; row: where they begin in a block.
struct MlaSegment {
  int64_t request, begin, end, row;
  const uint64_t *mask;  // of the request's queries, [queries, mask_tiles]: a bit for each key that one attends to, of
  int64_t mask_tiles;    // those that it sees; null: to all of them
};

// Cached rows of a block as float: latents [rows, lora] for the expansion, key parts [rows, rope].
struct MlaGatherArgs {
  const MlaInputs *inputs;
  const MlaSegment *segment;
  int64_t begin, end;  // positions
  float *latents, *k_pe;
};
VLLM_MS_DECLARE_KERNEL(mla_gather, MlaGatherArgs)

// One head and `num_queries` queries of a request, of those in this step, against one segment. out, max and sum hold
// the state of each query between segments.
struct MlaExpandedArgs {
  const MlaInputs *inputs;
  const MlaSegment *segment;
  int64_t head, first_query, num_queries;
  const float *expanded, *k_pe;  // [rows of the block, num_heads * (nope + v)], [rows of the block, rope]
  float *max, *sum;              // [num_tokens, num_heads]
  float *workspace;              // mla_expanded_workspace floats, 64-byte aligned
};
VLLM_MS_DECLARE_KERNEL(mla_attend_expanded, MlaExpandedArgs)
VLLM_MS_INLINE int64_t padded_pairs(int64_t size) { return (size + 31) / 32 * 32; }  // whole vectors of bf16, too
VLLM_MS_INLINE int64_t mla_expanded_workspace(const MlaInputs &in, int64_t rows) {
  const int64_t key = padded_pairs(in.nope + in.rope), value = padded_pairs(in.v);
  return rows * (key + value + kTileKeys + 2) + kTileKeys * (key + 2 * value) + key + value + 9 * kRowAlignment;
}

}  // namespace vllm_ms

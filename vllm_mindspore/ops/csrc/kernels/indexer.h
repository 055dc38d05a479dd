// The lightning indexer: which keys of its request a token of sparse attention attends to. What is compiled per
// instruction set; the division of a step into tasks is in ../indexer_plan.h, ../../indexer.py says what it means.
//
// Numerical contract. The score of a query and a key is a function of these two alone: one chain of fma over a head's
// elements, then one over the heads. With a bf16 cache whose rows bf16 dot products take, queries are rounded to bf16.
#pragma once

#include <cstdint>

#include "mla.h"
#include "norm.h"

namespace vllm_ms {

// One step of one layer. Everything is checked before a kernel sees it.
struct IndexerInputs {
  AttentionInputs step;  // query: [num_tokens, num_heads, head_size]; cache: rows [head_size] of one head
  HeadTransform rotation;  // of queries and keys
  const float *key_weights;  // of token t at t * key_weights_stride: its key, then the weights of the heads
  int64_t key_weights_stride;
  NormArgs key_norm;  // layer norm of keys; its rows are not used
  const int64_t *slot_mapping;
  int64_t top_k;
};

// Norms and rotates the keys of tokens [begin, end) and writes them into the cache. Slots outside of it are skipped.
struct IndexerRowArgs {
  const IndexerInputs *inputs;
  float *workspace;  // [head_size]
  int64_t begin, end;
};
VLLM_MS_DECLARE_KERNEL(indexer_write, IndexerRowArgs)

// A token whose keys are scored.
struct IndexerQuery {
  int64_t request, token, num_keys;
  float *heads;   // [num_heads, padded_head(head_size)]: rotated, or rounded in [num_heads, head_size] of bf16
  float *scores;  // [num_keys, up to a whole tile]
};

// Rotates the heads of one query.
struct IndexerQueryArgs {
  const IndexerInputs *inputs;
  const IndexerQuery *query;
  float *workspace;  // padded_head(head_size)
};
VLLM_MS_DECLARE_KERNEL(indexer_rotate, IndexerQueryArgs)

// Scores of `num_queries` tokens of one request, in order, with those of its keys [key_begin, key_end) that each sees;
// key_begin is a multiple of kTileKeys.
struct IndexerTaskArgs {
  const IndexerInputs *inputs;
  const IndexerQuery *queries;
  int64_t num_queries, key_begin, key_end;
  float *workspace;  // indexer_workspace floats, 64-byte aligned
};
VLLM_MS_DECLARE_KERNEL(indexer_score, IndexerTaskArgs)
VLLM_MS_INLINE int64_t indexer_workspace(const IndexerInputs &in) {
  return (kTileKeys + 1) * padded_head(in.step.cache.head_size) + in.step.num_heads * kTileKeys + 3 * kRowAlignment;
}

}  // namespace vllm_ms

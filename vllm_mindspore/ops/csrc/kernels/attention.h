// Attention over the paged KV cache: the part compiled per instruction set. Splitting a step into tasks is in
// ../attention_plan.h.
//
// A position below is that of a key among the keys of its request, which begin with the sinks where there are some.
//
// Numerical contract. For one query and head, keys are visited in tiles of kTileKeys ABSOLUTE positions, ascending, by
// online softmax; every kSplitKeys positions the running state (max, sum, accumulator) is folded into a total, and the
// next split starts afresh. All of it is a function of the query, its keys and their positions only. Which queries
// share a task, and whether the splits of one query are computed by one task or several, changes no bit of a result.
#pragma once

#include <cstdint>

#include "kv_cache.h"

namespace vllm_ms {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kRowAlignment = 16;  // floats; rows of the workspace are padded with zeros to a multiple of it

// One step of one layer. Everything is checked (see check_attention) before a kernel sees it.
struct AttentionInputs {
  const float *query = nullptr;  // head h of token t at query + t * query_stride + h * head_size
  int64_t query_stride = 0;
  const HeadTransform *query_transform = nullptr;  // norm and rotation when read; null for none
  int64_t num_tokens = 0;
  KvCache cache;
  const int32_t *block_table = nullptr;  // [num_requests, max_blocks]
  int64_t num_requests = 0;
  int64_t max_blocks = 0;
  const int32_t *query_start_loc = nullptr;  // [num_requests + 1]
  const int32_t *seq_lens = nullptr;         // [num_requests], with this step's tokens
  Weight sinks, alibi_slopes;                // [num_heads]
  const void *sink_kv = nullptr;  // [num_sinks, num_kv_heads, row_size], of the cache's type: keys and values that
  int64_t num_sinks = 0;          // every query sees, before those of its request; not with a window or slopes
  int64_t num_heads = 0;
  int64_t block_size = 0;
  int64_t sliding_window = 0;  // 0: none
  float scale = 0;
  float soft_cap = 0;    // 0: none
  float *out = nullptr;  // [num_tokens, num_heads * value_size]
};

// Queries [first_query, first_query + num_queries) of a request against KV heads [first_head, first_head + num_heads)
// and keys [key_begin, key_end). Its rows, num_heads * num_queries * group of them, are ordered by KV head, then query,
// then query head of the KV head.
struct AttentionTask {
  int64_t request;
  int64_t first_query;
  int64_t num_queries;
  int64_t first_head;
  int64_t num_heads;
  int64_t key_begin;
  int64_t key_end;
  // Null: the task sees all keys of its queries and writes the result. Otherwise it writes the state of each split and
  // row, [splits, rows, attention_state], for merge_attention; key_begin and key_end are then bounds of splits, or of
  // the keys of the queries.
  float *partial;
};

VLLM_MS_INLINE int64_t padded_head(int64_t head_size) {
  return (head_size + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// Floats of workspace for a task of at most `rows` rows; at least as much as the blocks of Workspace in attention.cc.
VLLM_MS_INLINE int64_t attention_workspace(int64_t rows, int64_t head_size) {
  const int64_t padded = padded_head(head_size);
  return rows * (4 * padded + 2 * kTileKeys + 7) + 9 * kRowAlignment + 2 * kTileKeys * padded + padded;
}

// Floats of the state of one row after one split: accumulator, maximum, sum.
VLLM_MS_INLINE int64_t attention_state(int64_t head_size) { return padded_head(head_size) + kRowAlignment; }

// The first position that the query at `position` sees.
VLLM_MS_INLINE int64_t first_key(const AttentionInputs &in, int64_t position) {
  return in.sliding_window > 0 && position >= in.sliding_window ? position - in.sliding_window + 1 : 0;
}

struct AttentionTaskArgs {
  const AttentionInputs *inputs;
  const AttentionTask *task;
  float *workspace;  // attention_workspace(rows, head_size) floats, 64-byte aligned
};
VLLM_MS_DECLARE_KERNEL(run_attention, AttentionTaskArgs)

// Folds the states of all splits of the task's rows, in ascending order, and writes the result. The task is one whose
// key range covers all splits, with `partial` at the first one.
VLLM_MS_DECLARE_KERNEL(merge_attention, AttentionTaskArgs)

}  // namespace vllm_ms

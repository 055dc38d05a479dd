// The tensors that describe the requests of a step, which every operator on a paged cache has.
#pragma once

#include "../aot.h"
#include "../attention_plan.h"

namespace vllm_ms {
namespace aot {

struct RequestTensors {
  const Tensor &block_table, &query_start_loc, &seq_lens;

  void infer() const {
    require_rank(block_table, 2, "block_table");
    require_rank(query_start_loc, 1, "query_start_loc");
    require_rank(seq_lens, 1, "seq_lens");
    require_equal(block_table.dim(0), seq_lens.dim(0), "block_table and seq_lens: number of requests");
    if (query_start_loc.dim(0) >= 0 && seq_lens.dim(0) >= 0) {
      require_equal(query_start_loc.dim(0), seq_lens.dim(0) + 1, "query_start_loc and number of requests + 1");
    }
  }

  void fill(AttentionInputs &in) const {
    for (const Tensor *t : {&block_table, &query_start_loc, &seq_lens}) {
      require(t->dtype == DType::i32, "block_table, query_start_loc and seq_lens: must be int32");
    }
    in.block_table = block_table.as<int32_t>();
    in.num_requests = seq_lens.dim(0);
    in.max_blocks = block_table.dim(1);
    in.query_start_loc = query_start_loc.as<int32_t>();
    in.seq_lens = seq_lens.as<int32_t>();
  }
};

// Slots and positions of the step's tokens, checked by value; a table without rows in use is not looked at.
inline void check_tokens(const AttentionInputs &in, const Tensor &slot_mapping, const Tensor &positions,
                         const Tensor &cos_sin) {
  require(positions.dtype == DType::i64, "positions: must be int64");
  require(slot_mapping.dtype == DType::i64, "slot_mapping: must be int64");
  const int64_t *slots = slot_mapping.as<int64_t>(), *at = positions.as<int64_t>();
  check_slots(slots, in.num_tokens, in.cache.num_slots);
  if (!cos_sin.given) return;
  const int64_t used = in.num_requests > 0 ? in.query_start_loc[in.num_requests] : 0;
  check_positions(at, 0, used, cos_sin.dim(0), nullptr);
  check_positions(at, used, in.num_tokens, cos_sin.dim(0), slots);
}

}  // namespace aot
}  // namespace vllm_ms

// Which tokens each expert gets in one step, and how that work is cut into pieces of about equal cost.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace vllm_ms {

// Tokens that one expert multiplies together: slots [first_slot, first_slot + tokens).
struct MoeJob {
  int64_t expert, first_slot, tokens;
};

// A job and a block of its expert's weight rows.
struct MoePlace {
  int64_t job, block;
};

// Slots are the pairs (token, one of its experts), ordered by expert and then by token. A pair whose expert is not in
// [0, experts) has no slot, an expert without tokens no job.
class MoePlan {
 public:
  // routing [tokens, 2 * top_k]: ids, then weights, as moe_route writes them. A job has at most `most_tokens` tokens.
  MoePlan(const float *routing, int64_t tokens, int64_t top_k, int64_t experts, int64_t most_tokens);

  int64_t num_jobs() const { return num_jobs_; }
  int64_t num_slots() const { return num_slots_; }
  int64_t max_tokens() const { return max_tokens_; }  // of any job
  const MoeJob &job(int64_t i) const { return jobs_[i]; }
  const int32_t *token_of_slot() const { return token_of_slot_; }
  const float *weight_of_slot() const { return weight_of_slot_; }

  // Pieces to cut all jobs into, where each has `blocks` blocks of weight rows.
  int64_t pieces(int64_t blocks) const;
  // Where piece `piece` of `pieces` begins in the order of jobs and then blocks; for piece == pieces, the end.
  MoePlace begin_of(int64_t piece, int64_t pieces, int64_t blocks) const;

 private:
  void add_jobs(int64_t expert, int64_t tokens, int64_t most_tokens);

  Scratch memory_;
  MoeJob *jobs_;
  int32_t *token_of_slot_;
  float *weight_of_slot_;
  int64_t num_jobs_ = 0, num_slots_ = 0, max_tokens_ = 0, cost_ = 0;
};

}  // namespace vllm_ms

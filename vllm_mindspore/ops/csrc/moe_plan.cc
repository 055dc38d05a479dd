#include "moe_plan.h"

#include <algorithm>

namespace vllm_ms {
namespace {

constexpr int64_t kReadCost = 24;  // reading a block of weights from memory takes about as long as so many tokens of it
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kTokensUnit = 6;  // jobs of one expert have multiples of so many tokens

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The expert of a pair, or -1 where there is none; NaN is none.
int64_t expert_of(float id, int64_t experts) {
  return id >= 0.0f && id < static_cast<float>(experts) ? static_cast<int64_t>(id) : -1;
}

int64_t job_cost(const MoeJob &job) { return kReadCost + job.tokens; }

int64_t most_jobs(int64_t pairs, int64_t experts, int64_t most_tokens) {
  return std::min(experts, pairs) + pairs / most_tokens;
}

}  // namespace

MoePlan::MoePlan(const float *routing, int64_t tokens, int64_t top_k, int64_t experts, int64_t most_tokens)
    : memory_(most_jobs(tokens * top_k, experts, most_tokens) * sizeof(MoeJob) +
              (2 * tokens * top_k + experts) * sizeof(int32_t)) {
  const int64_t pairs = tokens * top_k;
  jobs_ = memory_.as<MoeJob>();
  token_of_slot_ = reinterpret_cast<int32_t *>(jobs_ + most_jobs(pairs, experts, most_tokens));
  weight_of_slot_ = reinterpret_cast<float *>(token_of_slot_ + pairs);
  int32_t *slots = reinterpret_cast<int32_t *>(weight_of_slot_ + pairs);  // of each expert: their number, then the next
  std::fill(slots, slots + experts, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t expert = expert_of(routing[2 * t * top_k + j], experts);
      if (expert >= 0) ++slots[expert];
    }
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int32_t count = slots[expert];
    slots[expert] = static_cast<int32_t>(num_slots_);
    add_jobs(expert, count, most_tokens);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float *ids = routing + 2 * t * top_k, *weights = ids + top_k;
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t expert = expert_of(ids[j], experts);
      if (expert < 0) continue;
      const int32_t slot = slots[expert]++;
      token_of_slot_[slot] = static_cast<int32_t>(t);
      weight_of_slot_[slot] = weights[j];
    }
  }
}

void MoePlan::add_jobs(int64_t expert, int64_t tokens, int64_t most_tokens) {
  const int64_t parts = ceil_div(tokens, most_tokens);
  int64_t share = tokens;
  if (parts > 1) share = std::min(most_tokens, ceil_div(ceil_div(tokens, parts), kTokensUnit) * kTokensUnit);
  for (int64_t begin = 0; begin < tokens; begin += share) {
    const MoeJob job{expert, num_slots_ + begin, std::min(share, tokens - begin)};
    max_tokens_ = std::max(max_tokens_, job.tokens);
    cost_ += job_cost(job);
    jobs_[num_jobs_++] = job;
  }
  num_slots_ += tokens;
}

int64_t MoePlan::pieces(int64_t blocks) const {
  return std::min(num_jobs_ * blocks, kPiecesPerThread * num_threads());
}

MoePlace MoePlan::begin_of(int64_t piece, int64_t pieces, int64_t blocks) const {
  int64_t before = cost_ * blocks * piece / pieces;  // cost of what lies before the piece
  for (int64_t i = 0; i < num_jobs_; ++i) {
    const int64_t unit = job_cost(jobs_[i]), block = ceil_div(before, unit);
    if (block < blocks) return {i, block};
    before = std::max<int64_t>(0, before - blocks * unit);
  }
  return {num_jobs_, 0};
}

}  // namespace vllm_ms

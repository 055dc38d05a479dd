// What data-parallel ranks exchange around a layer of experts: each has tokens of its own, and some of the experts.
//
// A step's tokens are numbered over all ranks, those of rank 0 first. Each exchange is begun and later ended, with other
// work in between; while one is begun, others of a single round (Rounds::slot_bytes) can be begun and ended. Rows are
// float32 and arrive as they were sent; results do not depend on who has which tokens, but for the order in which combine
// adds: that of ranks.
#pragma once

#include <array>
#include <cstdint>

#include "collectives.h"

namespace vllm_ms {

// How many tokens of a step each rank has.
struct StepTokens {
  int64_t total = 0, most = 0;  // of any rank
  std::array<int64_t, kMostRanks> first{}, count{};

  // ranks [total]: the rank of each token. Throws std::invalid_argument where that is not in order, or not one of `size`.
  StepTokens(const int32_t *ranks, int64_t total, int size);
};

// Which ranks have an expert. Experts have places, `capacity` of them on each of the expert-parallel ranks, which are
// numbered row by row: `columns` of them are one row, those of a column are a group whose ranks exchange. capacity 0: every
// rank has (a part of) every expert.
struct ExpertHolders {
  int64_t capacity = 0, columns = 1, column = 0;

  // The rank of the group that has place `id`, or -1 where none has.
  int rank_of(float id) const;
  // Whether the rank has any of a token's experts; ids [top_k].
  bool any(int rank, const float *ids, int64_t top_k) const;
};

// x [count of this rank, width] to all: out [total, width].
uint32_t begin_gather_rows(Group &group, const StepTokens &tokens, const float *x, int64_t width);
void end_gather_rows(Group &group, uint32_t round, const StepTokens &tokens, const float *x, int64_t width, float *out);

// x [count of this rank, width] to the ranks that have experts of a token: out [total, width], zero where none is here.
// routing [total, 2 * top_k]: each token's places, then weights.
uint32_t begin_dispatch(Group &group, const StepTokens &tokens, const float *x, int64_t width);
void end_dispatch(Group &group, uint32_t round, const StepTokens &tokens, const ExpertHolders &holders,
                  const float *routing, int64_t top_k, const float *x, int64_t width, float *out);

// y [total, width], what this rank's experts computed for every token, to the tokens' ranks: out [count of this rank,
// width], the sum of what the ranks have that have experts of a token.
uint32_t begin_combine(Group &group, const StepTokens &tokens, const ExpertHolders &holders, const float *routing,
                       int64_t top_k, const float *y, int64_t width);
void end_combine(Group &group, uint32_t round, const StepTokens &tokens, const ExpertHolders &holders,
                 const float *routing, int64_t top_k, const float *y, int64_t width, float *out);

}  // namespace vllm_ms

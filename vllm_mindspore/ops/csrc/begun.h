// Collectives that are begun and ended apart, with other work in between; ranks may end them in another order than
// they began them, all in the same. Up to Rounds::kDepth may be begun at once, each of one round (Rounds::slot_bytes);
// what is longer goes on when it is ended.
//
// Values are float32; on their way they are float32 or, rounded to nearest even, bfloat16. Sums are taken in float32
// and in the order of ranks, this one's values rounded too, so that all ranks get the same bits.
#pragma once

#include <cstdint>

#include "exchange.h"

namespace vllm_ms {

// out[i] = sum over ranks of x[i]; [count].
uint32_t begin_all_reduce(Group &group, DType wire, const float *x, int64_t count);
void end_all_reduce(Group &group, uint32_t round, DType wire, const float *x, int64_t count, float *out);

// out [outer, size, inner] from each rank's x [outer, inner].
uint32_t begin_all_gather(Group &group, DType wire, const float *x, int64_t outer, int64_t inner);
void end_all_gather(Group &group, uint32_t round, DType wire, const float *x, int64_t outer, int64_t inner,
                    float *out);

// out [outer, inner] = sum over ranks of x [outer, size, inner] at this rank's place.
uint32_t begin_reduce_scatter(Group &group, DType wire, const float *x, int64_t outer, int64_t inner);
void end_reduce_scatter(Group &group, uint32_t round, DType wire, const float *x, int64_t outer, int64_t inner,
                        float *out);

// out [count of this rank, width] = sum over ranks of x [total, width] at the rows of this rank's tokens.
uint32_t begin_reduce_scatter_rows(Group &group, DType wire, const StepTokens &tokens, const float *x, int64_t width);
void end_reduce_scatter_rows(Group &group, uint32_t round, DType wire, const StepTokens &tokens, const float *x,
                             int64_t width, float *out);

// How many rows each rank sends to each: counts [size, size], row i those of rank i.
struct RowCounts {
  const int32_t *counts;
  int size;

  // Throws std::invalid_argument where one is negative.
  RowCounts(const int32_t *counts, int size);
  int64_t of(int from, int to) const { return counts[from * size + to]; }
  int64_t sent_by(int rank) const;
  int64_t sent_to(int rank) const;
  int64_t total() const;
  int64_t most() const;  // of any pair
};

// x [sent by this rank, width], rows for rank 0 first, to out [sent to this rank, width], rows of rank 0 first.
uint32_t begin_all_to_all(Group &group, DType wire, const RowCounts &counts, const float *x, int64_t width);
void end_all_to_all(Group &group, uint32_t round, DType wire, const RowCounts &counts, const float *x, int64_t width,
                    float *out);

// From rank 0 to rank 1 of a group that is one-way: x [count]. send returns when x has been copied, and waits only
// where Rounds::kDepth rounds have not been received.
void send(Group &group, DType wire, const float *x, int64_t count);
void receive(Group &group, DType wire, int64_t count, float *out);

}  // namespace vllm_ms

#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernels/reduce.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // from here on a second thread pays

int64_t row_bytes(int64_t width) { return width * static_cast<int64_t>(sizeof(float)); }

// Calls f(row) for rows [begin, end), on all threads where that pays.
template <class F>
void for_rows(int64_t begin, int64_t end, int64_t width, F f) {
  parallel_for(end - begin, std::max<int64_t>(1, kParallelBytes / std::max<int64_t>(1, row_bytes(width))),
               [&](int64_t first, int64_t last) {
                 for (int64_t row = begin + first; row < begin + last; ++row) f(row);
               });
}

void write_row(const float *from, int64_t width, float *slot) { std::memcpy(slot, from, row_bytes(width)); }
void read_row(const float *from, int64_t width, float *out) { copy_bytes({out, from, row_bytes(width)}); }

// Rows that fit into a slot.
int64_t rows_per_round(const Group &group, int64_t width) {
  const int64_t rows = group.slot_bytes() / std::max<int64_t>(1, row_bytes(width));
  if (rows < 1) throw std::runtime_error(text_of("group ", group.name(), ": a row of ", row_bytes(width), " bytes"));
  return rows;
}

// A rank's own rows in rounds, rows [begin, end) of it in each.
uint32_t post_rows(Group &group, Collective kind, const StepTokens &tokens, const float *x, int64_t width,
                   int64_t begin) {
  const int64_t count = tokens.count[group.rank()], end = std::min(count, begin + rows_per_round(group, width));
  return group.post(kind, count * row_bytes(width), [&](char *slot) {
    for_rows(begin, end, width, [&](int64_t row) {
      write_row(x + row * width, width, reinterpret_cast<float *>(slot) + (row - begin) * width);
    });
  }, [&](int) { return Part{0, std::max<int64_t>(0, end - begin) * row_bytes(width)}; });
}

// out[t] for every token t of the step that is wanted(t), zeros for the others.
template <class Wanted>
void take_rows(Group &group, Collective kind, uint32_t round, const StepTokens &tokens, const float *x, int64_t width,
               float *out, Wanted wanted) {
  const auto fill = [&](int64_t token, const float *row) {
    if (wanted(token)) {
      read_row(row, width, out + token * width);
    } else {
      std::memset(out + token * width, 0, row_bytes(width));
    }
  };
  const int64_t mine = tokens.first[group.rank()], per_round = rows_per_round(group, width);
  for_rows(0, tokens.count[group.rank()], width, [&](int64_t row) { fill(mine + row, x + row * width); });
  for (int64_t begin = 0; begin == 0 || begin < tokens.most; begin += per_round) {
    if (begin > 0) round = post_rows(group, kind, tokens, x, width, begin);
    group.take(round, kind, [&](int other) { return tokens.count[other] * row_bytes(width); }, [&] {
      for (int other = 0; other < group.size(); ++other) {
        if (other == group.rank()) continue;
        const float *rows = reinterpret_cast<const float *>(group.slot(other, round));
        const int64_t end = std::min(tokens.count[other], begin + per_round);
        for_rows(begin, end, width, [&](int64_t row) {
          fill(tokens.first[other] + row, rows + (row - begin) * width);
        });
      }
    });
  }
}

// Of y what other ranks need, rows [begin, end) of it in a round, each at its place.
uint32_t post_results(Group &group, const StepTokens &tokens, const ExpertHolders &holders, const float *routing,
                      int64_t top_k, const float *y, int64_t width, int64_t begin) {
  const int64_t end = std::min(tokens.total, begin + rows_per_round(group, width));
  const int64_t mine = tokens.first[group.rank()], after_mine = mine + tokens.count[group.rank()];
  return group.post(Collective::combine, tokens.total * row_bytes(width), [&](char *slot) {
    for_rows(begin, end, width, [&](int64_t token) {
      const bool own = token >= mine && token < after_mine;
      if (own || !holders.any(group.rank(), routing + token * 2 * top_k, top_k)) return;
      write_row(y + token * width, width, reinterpret_cast<float *>(slot) + (token - begin) * width);
    });
  }, [&](int other) {
    const int64_t from = std::max(begin, tokens.first[other]);
    const int64_t to = std::min(end, tokens.first[other] + tokens.count[other]);
    return Part{(from - begin) * row_bytes(width), std::max<int64_t>(0, to - from) * row_bytes(width)};
  });
}

}  // namespace

StepTokens::StepTokens(const int32_t *ranks, int64_t total, int size) : total(total) {
  for (int64_t t = 0; t < total; ++t) {
    if (ranks[t] < (t == 0 ? 0 : ranks[t - 1]) || ranks[t] >= size) {
      throw std::invalid_argument(text_of("token_ranks: ", ranks[t], " at ", t, ", expected ranks of ", size, " in order"));
    }
    ++count[ranks[t]];
  }
  for (int rank = 0; rank < size; ++rank) {
    first[rank] = rank == 0 ? 0 : first[rank - 1] + count[rank - 1];
    most = std::max(most, count[rank]);
  }
}

int ExpertHolders::rank_of(float id) const {
  if (!(id >= 0.0f)) return -1;
  const int64_t rank = static_cast<int64_t>(id) / capacity;
  return rank % columns == column ? static_cast<int>(rank / columns) : -1;
}

bool ExpertHolders::any(int rank, const float *ids, int64_t top_k) const {
  for (int64_t j = 0; j < top_k; ++j) {
    if (capacity == 0 ? ids[j] >= 0.0f : rank_of(ids[j]) == rank) return true;
  }
  return false;
}

uint32_t begin_gather_rows(Group &group, const StepTokens &tokens, const float *x, int64_t width) {
  return post_rows(group, Collective::gather_rows, tokens, x, width, 0);
}

void end_gather_rows(Group &group, uint32_t round, const StepTokens &tokens, const float *x, int64_t width, float *out) {
  take_rows(group, Collective::gather_rows, round, tokens, x, width, out, [](int64_t) { return true; });
}

uint32_t begin_dispatch(Group &group, const StepTokens &tokens, const float *x, int64_t width) {
  return post_rows(group, Collective::dispatch, tokens, x, width, 0);
}

void end_dispatch(Group &group, uint32_t round, const StepTokens &tokens, const ExpertHolders &holders,
                  const float *routing, int64_t top_k, const float *x, int64_t width, float *out) {
  take_rows(group, Collective::dispatch, round, tokens, x, width, out, [&](int64_t token) {
    return holders.any(group.rank(), routing + token * 2 * top_k, top_k);
  });
}

uint32_t begin_combine(Group &group, const StepTokens &tokens, const ExpertHolders &holders, const float *routing,
                       int64_t top_k, const float *y, int64_t width) {
  return post_results(group, tokens, holders, routing, top_k, y, width, 0);
}

void end_combine(Group &group, uint32_t round, const StepTokens &tokens, const ExpertHolders &holders,
                 const float *routing, int64_t top_k, const float *y, int64_t width, float *out) {
  const int64_t mine = tokens.first[group.rank()], after_mine = mine + tokens.count[group.rank()];
  const int64_t per_round = rows_per_round(group, width), bytes = tokens.total * row_bytes(width);
  for (int64_t begin = 0; begin == 0 || begin < tokens.total; begin += per_round) {
    if (begin > 0) round = post_results(group, tokens, holders, routing, top_k, y, width, begin);
    group.take(round, Collective::combine, [&](int) { return bytes; }, [&] {
      const int64_t from = std::max(begin, mine), to = std::min({tokens.total, begin + per_round, after_mine});
      for_rows(from, std::max(from, to), width, [&](int64_t token) {
        const void *parts[kMostRanks];
        int64_t num_parts = 0;
        for (int rank = 0; rank < group.size(); ++rank) {
          if (!holders.any(rank, routing + token * 2 * top_k, top_k)) continue;
          const float *rows = reinterpret_cast<const float *>(group.slot(rank, round));
          parts[num_parts++] = rank == group.rank() ? y + token * width : rows + (token - begin) * width;
        }
        float *row = out + (token - mine) * width;
        if (num_parts == 0) {
          std::memset(row, 0, row_bytes(width));
        } else {
          sum_parts({parts, num_parts, DType::f32, 0, width, row, DType::f32});
        }
      });
    });
  }
}

}  // namespace vllm_ms

// Of begun.h those of rows, of which ranks have unlike numbers.
#include <algorithm>
#include <stdexcept>

#include "begun.h"
#include "begun_plan.h"

namespace vllm_ms {
namespace {

struct ReduceScatterRows : Plan {
  const StepTokens &tokens;
  const float *x;
  int64_t width;
  float *out;

  ReduceScatterRows(Group &group, DType dtype, const StepTokens &tokens, const float *x, int64_t width, float *out)
      : Plan(group, dtype, Collective::reduce_scatter_rows, tokens.total * width, tokens.total, width), tokens(tokens),
        x(x), width(width), out(out) {}

  void write(int64_t begin, int64_t end, char *slot) const {
    wire.write(x + begin * width, (end - begin) * width, slot);
  }
  // Rows of a rank among [begin, end).
  int64_t first_of(int other, int64_t begin) const { return std::max(begin, tokens.first[other]); }
  int64_t count_of(int other, int64_t begin, int64_t end) const {
    const int64_t last = std::min(end, tokens.first[other] + tokens.count[other]);
    return std::max<int64_t>(0, last - first_of(other, begin));
  }
  Part part_of(int other, int64_t begin, int64_t end) const {
    const int64_t rows = count_of(other, begin, end);
    return rows == 0 ? Part{} : part((first_of(other, begin) - begin) * width, rows * width);
  }
  void read(uint32_t round, int64_t begin, int64_t end) const {
    const int64_t rows = count_of(rank(), begin, end), first = first_of(rank(), begin);
    if (rows == 0) return;
    const void *parts[kMostRanks];
    for (int other = 0; other < size(); ++other) {
      parts[other] = group.slot(other, round) + wire.bytes((first - begin) * width);
    }
    wire.sum(parts, size(), rows * width, out + (first - tokens.first[rank()]) * width);
  }
};

// A round has `per_round` rows of each pair, or what is left of them.
struct AllToAll : Plan {
  const RowCounts &counts;
  const float *x;
  int64_t width;
  float *out;

  AllToAll(Group &group, DType dtype, const RowCounts &counts, const float *x, int64_t width, float *out)
      : Plan(group, dtype, Collective::all_to_all, counts.total() * width, counts.most(), group.size() * width),
        counts(counts), x(x), width(width), out(out) {}

  int64_t rows(int from, int to, int64_t begin, int64_t end) const {
    return std::max<int64_t>(0, std::min(end, counts.of(from, to)) - begin);
  }
  void write(int64_t begin, int64_t end, char *slot) const {
    int64_t first = 0;
    for (int other = 0; other < size(); ++other) {
      const int64_t n = rows(rank(), other, begin, end) * width;
      wire.write(x + (first + begin) * width, n, slot + wire.bytes(other * per_round * width));
      first += counts.of(rank(), other);
    }
  }
  Part part_of(int other, int64_t begin, int64_t end) const {
    return part(other * per_round * width, rows(rank(), other, begin, end) * width);
  }
  void read(uint32_t round, int64_t begin, int64_t end) const {
    int64_t first = 0;
    for (int other = 0; other < size(); ++other) {
      const char *from = group.slot(other, round) + wire.bytes(rank() * per_round * width);
      wire.read(from, rows(other, rank(), begin, end) * width, out + (first + begin) * width);
      first += counts.of(other, rank());
    }
  }
};

}  // namespace

uint32_t begin_reduce_scatter_rows(Group &group, DType wire, const StepTokens &tokens, const float *x, int64_t width) {
  return begin(ReduceScatterRows(group, wire, tokens, x, width, nullptr));
}

void end_reduce_scatter_rows(Group &group, uint32_t round, DType wire, const StepTokens &tokens, const float *x,
                             int64_t width, float *out) {
  end(ReduceScatterRows(group, wire, tokens, x, width, out), round);
}

RowCounts::RowCounts(const int32_t *counts, int size) : counts(counts), size(size) {
  for (int i = 0; i < size * size; ++i) {
    if (counts[i] < 0) throw std::invalid_argument(text_of("counts: ", counts[i], " rows"));
  }
}

int64_t RowCounts::sent_by(int rank) const {
  int64_t rows = 0;
  for (int other = 0; other < size; ++other) rows += of(rank, other);
  return rows;
}

int64_t RowCounts::sent_to(int rank) const {
  int64_t rows = 0;
  for (int other = 0; other < size; ++other) rows += of(other, rank);
  return rows;
}

int64_t RowCounts::total() const {
  int64_t rows = 0;
  for (int rank = 0; rank < size; ++rank) rows += sent_by(rank);
  return rows;
}

int64_t RowCounts::most() const { return size == 0 ? 0 : *std::max_element(counts, counts + size * size); }

uint32_t begin_all_to_all(Group &group, DType wire, const RowCounts &counts, const float *x, int64_t width) {
  return begin(AllToAll(group, wire, counts, x, width, nullptr));
}

void end_all_to_all(Group &group, uint32_t round, DType wire, const RowCounts &counts, const float *x, int64_t width,
                    float *out) {
  end(AllToAll(group, wire, counts, x, width, out), round);
}

}  // namespace vllm_ms

#include "begun.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernels/reduce.h"
#include "parallel.h"
#include "runs.h"

namespace vllm_ms {
namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // from here on a second thread pays

// Values on their way: converts, copies and adds them.
class Wire {
 public:
  explicit Wire(DType dtype) : dtype_(dtype), bytes_(dtype_size(dtype)) {
    if (dtype != DType::f32 && dtype != DType::bf16) throw std::invalid_argument("values go as float32 or bfloat16");
  }

  int64_t bytes(int64_t count) const { return count * bytes_; }
  // How many values fit into `bytes`.
  int64_t fit(int64_t bytes) const { return bytes / bytes_; }

  void write(const float *from, int64_t count, char *to) const { convert(from, DType::f32, count, to, dtype_); }
  void read(const char *from, int64_t count, float *to) const { convert(from, dtype_, count, to, DType::f32); }
  void sum(const void *const *parts, int num_parts, int64_t count, float *to) const {
    add(parts, num_parts, dtype_, count, to, DType::f32);
  }

 private:
  void convert(const void *from, DType from_dtype, int64_t count, void *to, DType to_dtype) const {
    add(&from, 1, from_dtype, count, to, to_dtype);
  }
  void add(const void *const *parts, int num_parts, DType dtype, int64_t count, void *to, DType to_dtype) const {
    parallel_for(count, kParallelBytes / bytes_, [&](int64_t begin, int64_t end) {
      sum_parts({parts, num_parts, dtype, begin, end, to, to_dtype});
    });
  }

  DType dtype_;
  int64_t bytes_;
};

// A collective of `count` units, `per_round` of them in a round: `write` puts units [begin, end) into the slot, of
// which rank r reads part_of(r), and `read` takes them from the slots of all. What all of them have in common:
struct Plan {
  Group &group;
  Wire wire;
  Collective kind;
  int64_t bytes, count, per_round;  // bytes: to tell whether ranks are at the same collective

  Plan(Group &group, DType dtype, Collective kind, int64_t values, int64_t count, int64_t unit_values)
      : group(group), wire(dtype), kind(kind), bytes(wire.bytes(values)), count(count) {
    per_round = wire.fit(group.slot_bytes()) / std::max<int64_t>(1, unit_values);
    if (per_round < 1) throw std::runtime_error(text_of("group ", group.name(), ": rows of ", unit_values, " values"));
    per_round = std::min(per_round, std::max<int64_t>(1, count));
  }

  Part part(int64_t first, int64_t values) const { return {wire.bytes(first), wire.bytes(values)}; }
  int size() const { return group.size(); }
  int rank() const { return group.rank(); }
};

template <class P>
uint32_t post(const P &plan, int64_t begin) {
  const int64_t end = std::min(plan.count, begin + plan.per_round);
  return plan.group.post(plan.kind, plan.bytes, [&](char *slot) { plan.write(begin, end, slot); },
                         [&](int other) { return plan.part_of(other, begin, end); });
}

template <class P>
uint32_t begin(const P &plan) {
  return post(plan, 0);
}

template <class P>
void end(const P &plan, uint32_t round) {
  for (int64_t begin = 0; begin == 0 || begin < plan.count; begin += plan.per_round) {
    if (begin > 0) round = post(plan, begin);
    const int64_t end = std::min(plan.count, begin + plan.per_round);
    plan.group.take(round, plan.kind, [&](int) { return plan.bytes; }, [&] { plan.read(round, begin, end); });
  }
}

struct AllReduce : Plan {
  const float *x;
  float *out;

  AllReduce(Group &group, DType dtype, const float *x, int64_t count, float *out)
      : Plan(group, dtype, Collective::all_reduce_start, count, count, 1), x(x), out(out) {}

  void write(int64_t begin, int64_t end, char *slot) const { wire.write(x + begin, end - begin, slot); }
  Part part_of(int, int64_t begin, int64_t end) const { return part(0, end - begin); }
  void read(uint32_t round, int64_t begin, int64_t end) const {
    const void *parts[kMostRanks];
    for (int other = 0; other < size(); ++other) parts[other] = group.slot(other, round);
    wire.sum(parts, size(), end - begin, out + begin);
  }
};

struct AllGather : Plan {
  const float *x;
  int64_t inner;
  float *out;

  AllGather(Group &group, DType dtype, const float *x, int64_t outer, int64_t inner, float *out)
      : Plan(group, dtype, Collective::all_gather_start, outer * inner, outer * inner, 1), x(x), inner(inner),
        out(out) {}

  void write(int64_t begin, int64_t end, char *slot) const { wire.write(x + begin, end - begin, slot); }
  Part part_of(int, int64_t begin, int64_t end) const { return part(0, end - begin); }
  void read(uint32_t round, int64_t begin, int64_t end) const {
    for (int other = 0; other < size(); ++other) {
      const char *from = group.slot(other, round);
      for_runs(begin, end, other, size(), inner, [&](int64_t to, int64_t at, int64_t n) {
        wire.read(from + wire.bytes(at), n, out + to);
      });
    }
  }
};

struct ReduceScatter : Plan {
  const float *x;
  int64_t inner;
  float *out;

  ReduceScatter(Group &group, DType dtype, const float *x, int64_t outer, int64_t inner, float *out)
      : Plan(group, dtype, Collective::reduce_scatter_start, outer * inner * group.size(), outer * inner, group.size()),
        x(x), inner(inner), out(out) {}

  void write(int64_t begin, int64_t end, char *slot) const {
    for (int other = 0; other < size(); ++other) {
      char *to = slot + wire.bytes(other * (end - begin));
      for_runs(begin, end, other, size(), inner, [&](int64_t from, int64_t at, int64_t n) {
        wire.write(x + from, n, to + wire.bytes(at));
      });
    }
  }
  Part part_of(int other, int64_t begin, int64_t end) const { return part(other * (end - begin), end - begin); }
  void read(uint32_t round, int64_t begin, int64_t end) const {
    const void *parts[kMostRanks];
    const int64_t mine = wire.bytes(rank() * (end - begin));
    for (int other = 0; other < size(); ++other) parts[other] = group.slot(other, round) + mine;
    wire.sum(parts, size(), end - begin, out + begin);
  }
};

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

uint32_t begin_all_reduce(Group &group, DType wire, const float *x, int64_t count) {
  return begin(AllReduce(group, wire, x, count, nullptr));
}

void end_all_reduce(Group &group, uint32_t round, DType wire, const float *x, int64_t count, float *out) {
  end(AllReduce(group, wire, x, count, out), round);
}

uint32_t begin_all_gather(Group &group, DType wire, const float *x, int64_t outer, int64_t inner) {
  return begin(AllGather(group, wire, x, outer, inner, nullptr));
}

void end_all_gather(Group &group, uint32_t round, DType wire, const float *x, int64_t outer, int64_t inner,
                    float *out) {
  end(AllGather(group, wire, x, outer, inner, out), round);
}

uint32_t begin_reduce_scatter(Group &group, DType wire, const float *x, int64_t outer, int64_t inner) {
  return begin(ReduceScatter(group, wire, x, outer, inner, nullptr));
}

void end_reduce_scatter(Group &group, uint32_t round, DType wire, const float *x, int64_t outer, int64_t inner,
                        float *out) {
  end(ReduceScatter(group, wire, x, outer, inner, out), round);
}

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

namespace {

struct Sent : Plan {
  Sent(Group &group, DType dtype, int64_t count, int sender)
      : Plan(group, dtype, Collective::send, count, count, 1) {
    if (!group.one_way() || group.rank() != sender) {
      throw std::runtime_error(text_of("group ", group.name(), ": of a one-way group rank 0 sends, rank 1 receives"));
    }
  }
};

}  // namespace

void send(Group &group, DType wire, const float *x, int64_t count) {
  const Sent plan(group, wire, count, 0);
  for (int64_t begin = 0; begin == 0 || begin < count; begin += plan.per_round) {
    const int64_t n = std::min(count, begin + plan.per_round) - begin;
    group.leave_to_receiver(group.post(plan.kind, plan.bytes, [&](char *slot) { plan.wire.write(x + begin, n, slot); },
                                       [&](int) { return plan.part(0, n); }));
  }
}

void receive(Group &group, DType wire, int64_t count, float *out) {
  const Sent plan(group, wire, count, 1);
  for (int64_t begin = 0; begin == 0 || begin < count; begin += plan.per_round) {
    const int64_t n = std::min(count, begin + plan.per_round) - begin;
    const uint32_t round = group.next_to_take();
    group.take(round, plan.kind, [&](int) { return plan.bytes; },
               [&] { plan.wire.read(group.slot(0, round), n, out + begin); });
  }
}

}  // namespace vllm_ms

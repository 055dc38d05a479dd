#include "begun.h"

#include "begun_plan.h"
#include "runs.h"

namespace vllm_ms {
namespace {

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

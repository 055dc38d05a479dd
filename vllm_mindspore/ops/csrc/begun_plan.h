// What the collectives of begun.h have in common: how values go, and how one is cut into rounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "collectives.h"
#include "kernels/reduce.h"
#include "parallel.h"

namespace vllm_ms {

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
  static constexpr int64_t kParallelBytes = 1 << 17;  // from here on a second thread pays

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

}  // namespace vllm_ms

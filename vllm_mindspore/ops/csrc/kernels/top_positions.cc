#include "top_positions.h"

#include "sample_boundary.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr uint32_t kLast = 0xffffffffu;  // above the key of every number

// The `rank`-th smallest (from 1) of the keys, which are overwritten. *below: how many are smaller.
uint32_t key_of_rank(uint32_t *keys, int64_t size, int64_t rank, int64_t *below) {
  *below = 0;
  for (int shift : kDigitShifts) {
    int64_t buckets[kBuckets] = {};
    for (int64_t i = 0; i < size; ++i) ++buckets[keys[i] >> shift & (kBuckets - 1)];
    uint32_t digit = 0;
    for (; *below + buckets[digit] < rank; ++digit) *below += buckets[digit];
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      kept += (key >> shift & (kBuckets - 1)) == digit;
    }
    size = kept;
  }
  return keys[0];
}

}  // namespace

void top_positions(const TopPositionsArgs &args) {
  uint32_t *keys = args.workspace, *copy = keys + args.size;
  for (int64_t i = 0; i < args.size; ++i) {
    const float score = args.scores[i];
    keys[i] = score == score ? descending_key(score) : kLast;
  }
  std::memcpy(copy, keys, args.size * sizeof(uint32_t));
  int64_t below = 0;
  const uint32_t boundary = key_of_rank(copy, args.size, args.top_k, &below);
  int64_t found = 0, equal = args.top_k - below;
  for (int64_t i = 0; found < args.top_k; ++i) {
    const bool tie = keys[i] == boundary;
    args.out[found] = static_cast<float>(i);
    found += keys[i] < boundary || (tie && equal > 0);
    equal -= tie;
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

// tile_product.h's products for weights in columns (columns.h). A lane adds the products of its column's pairs with k
// ascending, however many tokens there are.
#pragma once

#include "../columns.h"
#include "tile_product.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

template <>
struct Packed<bf16_columns> {
  using Type = bf16;
  static constexpr int kStep = 2 * kLanes;
};

constexpr int kColumnTokens = 12;        // at once, with two groups of columns: 24 sums in registers
constexpr int64_t kColumnPanel = 4096;   // elements of k of a block, to stay in the second-level cache
constexpr int64_t kPrefetchDepth = 32;   // elements of k between two prefetches
static_assert(kUp == kColumnGroup && kLanes == kColumnGroup, "a group of rows is a vector of columns");

// The block that comes next, to be brought into the second-level cache in equal shares, in the order of its addresses.
class NextBlock {
 public:
  // shares: how often some() will be called
  NextBlock(const BlockRows<bf16_columns> &block, int64_t shares) {
    if (block.next == 0) return;
    constexpr int64_t kLine = 64 / sizeof(bf16);
    for (int group = 0; group < block.groups(); ++group) {
      places_[group] = reinterpret_cast<const char *>(block.first[group] + block.next);
      lines_[group] = (block.count[group] * block.k + kLine - 1) / kLine;
    }
    share_ = (lines_[0] + lines_[1] + shares - 1) / max64(1, shares);
  }
  void some() {
    for (int64_t left = share_; left > 0;) {
      if (at_ == lines_[group_]) {
        if (group_ == 1) return;
        group_ = 1;
        at_ = 0;
        continue;
      }
      const int64_t end = min64(lines_[group_], at_ + left);
      left -= end - at_;
      for (; at_ < end; ++at_) __builtin_prefetch(places_[group_] + 64 * at_, 0, 2);
    }
  }

 private:
  const char *places_[2] = {};
  int64_t lines_[2] = {}, share_ = 0, at_ = 0;
  int group_ = 0;
};

// Groups of a block: both whole, or one of up to 16 columns.
struct WholeGroups {
  static constexpr int kCount = 2;
  const bf16_columns *first[2];

  explicit WholeGroups(const BlockRows<bf16_columns> &block) : first{block.first[0], block.first[1]} {}
  __m512bh pairs(int group, int64_t k) const { return load_pairs(first[group] + k * kColumnGroup); }
};

struct PartialGroup {
  static constexpr int kCount = 1;
  const bf16_columns *first;
  int64_t rows;
  __mmask16 lanes;

  PartialGroup(const BlockRows<bf16_columns> &block, int group)
      : first(block.first[group]), rows(block.count[group]), lanes(static_cast<__mmask16>((1u << rows) - 1)) {}
  __m512bh pairs(int, int64_t k) const {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(lanes, first + k * rows));
  }
};

// sums of `MT` tokens from `token` on += the products of elements [begin, end) of k.
template <int MT, class Groups>
void multiply_columns(const Groups &groups, const PackedRows<bf16> &x, int64_t token, int64_t begin, int64_t end,
                      NextBlock &next, float *sums) {
  constexpr int kBases = (MT + 2) / 3;  // a pointer for every 3 tokens: one for each does not fit into the registers
  const bf16 *bases[kBases];
#pragma GCC unroll 4
  for (int b = 0; b < kBases; ++b) bases[b] = x.row(token + 3 * b) + begin;
  Vec sum[MT][Groups::kCount];
  float *saved = sums + token * kBlock;
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
    for (int g = 0; g < Groups::kCount; ++g) sum[j][g] = begin == 0 ? zero() : load(saved + j * kBlock + g * kUp);
  }
  for (int64_t step = begin; step < end; step += kPrefetchDepth) {
    next.some();
    const int64_t stop = min64(step + kPrefetchDepth, end);
    for (int64_t k = step; k < stop; k += 2) {
      __m512bh weights[Groups::kCount];
      for (int g = 0; g < Groups::kCount; ++g) weights[g] = groups.pairs(g, k);
#pragma GCC unroll 12
      for (int j = 0; j < MT; ++j) {
        const __m512bh pair = repeat_pair(bases[j / 3] + j % 3 * x.stride);
        for (int g = 0; g < Groups::kCount; ++g) sum[j][g] = dot_pairs(weights[g], pair, sum[j][g]);
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBases; ++b) bases[b] += 2;
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
    for (int g = 0; g < Groups::kCount; ++g) store(saved + j * kBlock + g * kUp, sum[j][g]);
  }
}

template <class Groups>
void multiply_groups(const Groups &groups, const BlockRows<bf16_columns> &block, const PackedRows<bf16> &x,
                     NextBlock &next, float *sums) {
  const int64_t passes = (x.count + kColumnTokens - 1) / kColumnTokens;
  for (int64_t begin = 0; begin == 0 || begin < block.k; begin += kColumnPanel) {
    const int64_t end = min64(begin + kColumnPanel, block.k);
    for (int64_t pass = 0, token = 0; pass < passes; ++pass) {
      const int64_t count = (x.count - token + passes - pass - 1) / (passes - pass);
      with_count<kColumnTokens>(count, [&](auto tokens) {
        multiply_columns<tokens()>(groups, x, token, begin, end, next, sums);
      });
      token += count;
    }
  }
}

inline void multiply_block(const BlockRows<bf16_columns> &block, const PackedRows<bf16> &x, float *sums) {
  const int64_t passes = (x.count + kColumnTokens - 1) / kColumnTokens;
  const int64_t steps = passes * ((block.k + kPrefetchDepth - 1) / kPrefetchDepth);
  if (block.count[0] == kColumnGroup && block.count[1] == kColumnGroup) {
    NextBlock next(block, steps);
    return multiply_groups(WholeGroups(block), block, x, next, sums);
  }
  NextBlock next(block, steps * block.groups());
  for (int group = 0; group < block.groups(); ++group) {
    multiply_groups(PartialGroup(block, group), block, x, next, sums + group * kUp);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif

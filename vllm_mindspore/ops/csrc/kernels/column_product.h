// tile_product.h's products for weights in columns (columns.h), also coded ones (coded.h). A lane adds the
// products of its column's pairs with k ascending, however many tokens there are.
#pragma once

#include "../coded.h"
#include "tile_product.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

template <>
struct Packed<bf16_columns> {
  using Type = bf16;
  static constexpr int kStep = 2 * kLanes;
};
template <>
struct Packed<bf16_coded> : Packed<bf16_columns> {};

constexpr int kColumnTokens = 12;        // at once, with two groups of columns: 24 sums in registers
constexpr int64_t kColumnPanel = 4096;   // elements of k of a block, to stay in the second-level cache
constexpr int64_t kKeepPasses = 6;       // from here on the first pass over coded weights writes down what it decodes
constexpr int64_t kPrefetchDepth = 32;   // elements of k between two prefetches
static_assert(kUp == kColumnGroup && kLanes == kColumnGroup, "a group of rows is a vector of columns");

// The block that comes next, to be brought into the second-level cache in equal shares, in the order of its addresses.
class NextBlock {
 public:
  // shares: how often some() will be called
  template <class T>
  NextBlock(const BlockRows<T> &block, int64_t shares) {
    if (block.next == 0) return;
    for (int group = 0; group < block.groups(); ++group) {
      places_[group] = reinterpret_cast<const char *>(block.first[group] + block.next);
      lines_[group] = (read_bytes(block, group) + kLine - 1) / kLine;
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
      for (; at_ < end; ++at_) __builtin_prefetch(places_[group_] + kLine * at_, 0, 2);
    }
  }

 private:
  static int64_t read_bytes(const BlockRows<bf16_columns> &block, int group) {
    return block.count[group] * block.k * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t read_bytes(const BlockRows<bf16_coded> &block, int) { return coded_bytes(block.k); }

  const char *places_[2] = {};
  int64_t lines_[2] = {}, share_ = 0, at_ = 0;
  int group_ = 0;
};

// Groups of a block: both whole, or one of up to 16 columns. After start(k), read<i>() gives the pairs of k for a k that
// is 2 * i more than a multiple of kDepth, by ascending k.
struct WholeGroups {
  static constexpr int kCount = 2, kDepth = 2;
  const bf16_columns *first[2];

  explicit WholeGroups(const BlockRows<bf16_columns> &block) : first{block.first[0], block.first[1]} {}
  void start(int64_t) {}
  template <int>
  void read(int64_t k, __m512bh (&pairs)[2]) {
    for (int group = 0; group < 2; ++group) pairs[group] = load_pairs(first[group] + k * kColumnGroup);
  }
};

struct PartialGroup {
  static constexpr int kCount = 1, kDepth = 2;
  const bf16_columns *first;
  int64_t rows;
  __mmask16 lanes;

  PartialGroup(const BlockRows<bf16_columns> &block, int group)
      : first(block.first[group]), rows(block.count[group]), lanes(static_cast<__mmask16>((1u << rows) - 1)) {}
  void start(int64_t) {}
  template <int>
  void read(int64_t k, __m512bh (&pairs)[1]) {
    pairs[0] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(lanes, first + k * rows));
  }
};

// `Count` groups with coded upper bytes. Keep: what is read is also written to `decoded`, in columns.
template <int Count, bool Keep>
struct CodedGroups {
  static constexpr int kCount = Count, kDepth = kOctet;
  bf16_columns *decoded[Count];
  const uint8_t *lower[Count], *codes[Count];
  __m512i upper[Count];
  const CodedException *exceptions[Count], *next[Count];
  int64_t next_k;  // of the first pair that has an exception

  CodedGroups(const bf16_coded *const *first, int64_t k, bf16_columns *scratch) {
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) {
      decoded[group] = scratch + group * kColumnGroup * k;
      const CodedGroup coded(first[group], k);
      lower[group] = coded.lower;
      codes[group] = coded.codes;
      upper[group] = _mm512_loadu_si512(coded.upper);
      exceptions[group] = coded.exceptions;
    }
  }
  void start(int64_t k) {
    for (int group = 0; group < Count; ++group) {
      next[group] = exceptions[group];
      while (next[group]->k < k) ++next[group];  // the last one's k is higher than any
    }
    find_next();
  }
  // Every other byte of what is loaded belongs to another pair: it is where the upper byte goes, or an index for a byte
  // that stays.
  template <int I>
  __attribute__((always_inline)) void read(int64_t k, __m512bh (&pairs)[Count]) {
    constexpr __mmask64 kUppers = 0xaaaaaaaaaaaaaaaa;
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) {
      const __m512i lowers = _mm512_loadu_si512(lower[group] + (k - I % 2 * 2) * kColumnGroup + I % 2);
      __m512i code = _mm512_loadu_si512(codes[group] + (k - 2 * I) * (kColumnGroup / 2) - I % 2);
      if constexpr (I >= 2) code = _mm512_srli_epi16(code, 4);
      pairs[group] = reinterpret_cast<__m512bh>(_mm512_mask_permutexvar_epi8(lowers, kUppers, code, upper[group]));
    }
    if (__builtin_expect(k == next_k, 0)) {
#pragma GCC unroll 2
      for (int group = 0; group < Count; ++group) {
        alignas(64) uint16_t elements[kPairElements];
        _mm512_store_si512(elements, reinterpret_cast<__m512i>(pairs[group]));
        for (; next[group]->k == k; ++next[group]) elements[next[group]->place] = next[group]->bits;
        pairs[group] = load_pairs(elements);
      }
      find_next();
    }
    if constexpr (Keep) {
#pragma GCC unroll 2
      for (int group = 0; group < Count; ++group) {
        _mm512_store_si512(decoded[group] + k * kColumnGroup, reinterpret_cast<__m512i>(pairs[group]));
      }
    }
  }

 private:
  void find_next() {
    next_k = next[0]->k;
    for (int group = 1; group < Count; ++group) next_k = min64(next_k, next[group]->k);
  }
};

// sums += the products of the pairs that read<I>() gives with those of `MT` tokens.
template <int MT, int I, class Groups>
VLLM_MS_INLINE void multiply_pairs(Groups &groups, int64_t k, const bf16 *(&bases)[(MT + 2) / 3], int64_t stride,
                                   Vec (&sum)[MT][Groups::kCount]) {
  __m512bh weights[Groups::kCount];
  groups.template read<I>(k, weights);
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
    const __m512bh pair = repeat_pair(bases[j / 3] + j % 3 * stride);
    for (int g = 0; g < Groups::kCount; ++g) sum[j][g] = dot_pairs(weights[g], pair, sum[j][g]);
  }
#pragma GCC unroll 4
  for (int b = 0; b < (MT + 2) / 3; ++b) bases[b] += 2;
}

// sums of `MT` tokens from `token` on += the products of elements [begin, end) of k.
template <int MT, class Groups>
void multiply_columns(Groups groups, const PackedRows<bf16> &x, int64_t token, int64_t begin, int64_t end,
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
  groups.start(begin);
  for (int64_t step = begin; step < end; step += kPrefetchDepth) {
    next.some();
    const int64_t stop = min64(step + kPrefetchDepth, end);
    for (int64_t k = step; k < stop; k += Groups::kDepth) {
      multiply_pairs<MT, 0>(groups, k, bases, x.stride, sum);
      if constexpr (Groups::kDepth == kOctet) {
        multiply_pairs<MT, 1>(groups, k + 2, bases, x.stride, sum);
        multiply_pairs<MT, 2>(groups, k + 4, bases, x.stride, sum);
        multiply_pairs<MT, 3>(groups, k + 6, bases, x.stride, sum);
      }
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
    for (int g = 0; g < Groups::kCount; ++g) store(saved + j * kBlock + g * kUp, sum[j][g]);
  }
}

inline int64_t column_passes(const PackedRows<bf16> &x) { return (x.count + kColumnTokens - 1) / kColumnTokens; }

// first: the groups as the first pass over the tokens reads them, which may make them what the `others` read.
template <class First, class Others>
void multiply_groups(const First &first, const Others &others, int64_t k, const PackedRows<bf16> &x, NextBlock &next,
                     float *sums) {
  const int64_t passes = column_passes(x);
  for (int64_t begin = 0; begin == 0 || begin < k; begin += kColumnPanel) {
    const int64_t end = min64(begin + kColumnPanel, k);
    for (int64_t pass = 0, token = 0; pass < passes; ++pass) {
      const int64_t count = (x.count - token + passes - pass - 1) / (passes - pass);
      with_count<kColumnTokens>(count, [&](auto tokens) {
        if (pass == 0) {
          multiply_columns<tokens()>(first, x, token, begin, end, next, sums);
        } else {
          multiply_columns<tokens()>(others, x, token, begin, end, next, sums);
        }
      });
      token += count;
    }
  }
}

// How often a block's groups will ask for some of the next one.
inline int64_t prefetch_shares(const PackedRows<bf16> &x, int64_t k) {
  return column_passes(x) * ((k + kPrefetchDepth - 1) / kPrefetchDepth);
}

inline void multiply_block(const BlockRows<bf16_columns> &block, const PackedRows<bf16> &x, float *sums) {
  if (block.count[0] == kColumnGroup && block.count[1] == kColumnGroup) {
    NextBlock next(block, prefetch_shares(x, block.k));
    const WholeGroups groups(block);
    return multiply_groups(groups, groups, block.k, x, next, sums);
  }
  NextBlock next(block, prefetch_shares(x, block.k) * block.groups());
  for (int group = 0; group < block.groups(); ++group) {
    const PartialGroup groups(block, group);
    multiply_groups(groups, groups, block.k, x, next, sums + group * kUp);
  }
}

inline void multiply_block(const BlockRows<bf16_coded> &block, const PackedRows<bf16> &x, float *sums) {
  NextBlock next(block, prefetch_shares(x, block.k));
  const auto multiply = [&](const auto &first, const auto &others) {
    multiply_groups(first, others, block.k, x, next, sums);
  };
  if (column_passes(x) < kKeepPasses) {
    const CodedGroups<1, false> one(block.first, block.k, nullptr);
    if (block.groups() == 1) return multiply(one, one);
    const CodedGroups<2, false> both(block.first, block.k, nullptr);
    return multiply(both, both);
  }
  const int64_t elements = kColumnGroup * block.k;
  const Scratch scratch(block.groups() * elements * sizeof(bf16));
  bf16_columns *decoded = scratch.as<bf16_columns>();
  const BlockRows<bf16_columns> plain{{decoded, decoded + elements}, {block.count[0], block.count[1]}, 1, block.k, 0};
  if (block.groups() == 1) return multiply(CodedGroups<1, true>(block.first, block.k, decoded), PartialGroup(plain, 0));
  multiply(CodedGroups<2, true>(block.first, block.k, decoded), WholeGroups(plain));
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif

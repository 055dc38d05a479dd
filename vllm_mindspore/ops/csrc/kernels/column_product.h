// tile_product.h's products for weights in columns (columns.h), also coded ones (coded.h). A lane adds the products of
// its column with k ascending, however many tokens there are. What an instruction set does is in column_avx2.h and
// column_avx512.h.
#pragma once

#include "../coded.h"
#include "tile_product.h"

#if defined(__AVX2__)
#define VLLM_MS_COLUMNS  // the variant has these products

#if defined(__AVX512BF16__)
#include "column_avx512.h"
#else
#include "column_avx2.h"
#endif

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int64_t kPrefetchDepth = 32;   // elements of k between two prefetches
static_assert(kUp == kColumnGroup, "gate and up are a group of columns each");

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
// is 2 * i more than a multiple of kDepth, by ascending k. one(group) is one of them alone, as they are read for more than
// kMostTogether tokens.
template <int Count>
struct WholeGroups {
  using Pairs = ColumnPairs;
  static constexpr int kCount = Count, kDepth = 2;
  static constexpr int64_t kMostTogether = kTogether;
  const bf16_columns *first[Count];

  void start(int64_t) {}
  template <int>
  void read(int64_t k, ColumnPairs (&pairs)[Count]) {
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) pairs[group] = ColumnPairs::load(first[group] + k * kColumnGroup);
  }
  WholeGroups<1> one(int group) const { return {{first[group]}}; }
};

struct PartialGroup {
  using Pairs = ColumnPairs;
  static constexpr int kCount = 1, kDepth = 2;
  static constexpr int64_t kMostTogether = kTogether;
  const bf16_columns *first;
  int64_t rows;

  PartialGroup(const BlockRows<bf16_columns> &block, int group) : first(block.first[group]), rows(block.count[group]) {}
  void start(int64_t) {}
  template <int>
  void read(int64_t k, ColumnPairs (&pairs)[1]) {
    pairs[0] = ColumnPairs::load_part(first + k * rows, rows);
  }
  PartialGroup one(int) const { return *this; }
};

// `Count` groups with coded upper bytes.
template <int Count>
struct CodedGroups {
  using Pairs = ColumnPairs;
  static constexpr int kCount = Count, kDepth = kOctet;
  static constexpr int64_t kMostTogether = kTogetherCoded;
  const uint8_t *lower[Count], *codes[Count];
  UpperBytes upper[Count];
  const CodedException *exceptions[Count], *next[Count];
  int64_t next_k;  // of the first pair that has an exception

  CodedGroups() = default;
  CodedGroups(const bf16_coded *const *first, int64_t k) {
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) {
      const CodedGroup coded(first[group], k);
      lower[group] = coded.lower;
      codes[group] = coded.codes;
      upper[group] = load_upper_bytes(coded.upper);
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
  template <int I>
  __attribute__((always_inline)) void read(int64_t k, ColumnPairs (&pairs)[Count]) {
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) {
      pairs[group] = ColumnPairs::decode<I>(lower[group] + (k - I % 2 * 2) * kColumnGroup + I % 2,
                                            codes[group] + (k - 2 * I) * (kColumnGroup / 2) - I % 2, upper[group]);
    }
    if (__builtin_expect(k == next_k, 0)) {
#pragma GCC unroll 2
      for (int group = 0; group < Count; ++group) {
        alignas(64) uint16_t elements[kPairElements];
        pairs[group].store(elements);
        for (; next[group]->k == k; ++next[group]) elements[next[group]->place] = next[group]->bits;
        pairs[group] = ColumnPairs::load(elements);
      }
      find_next();
    }
  }
  CodedGroups<1> one(int group) const {
    CodedGroups<1> result;
    result.lower[0] = lower[group];
    result.codes[0] = codes[group];
    result.upper[0] = upper[group];
    result.exceptions[0] = exceptions[group];
    return result;
  }

 private:
  void find_next() {
    next_k = next[0]->k;
    for (int group = 1; group < Count; ++group) next_k = min64(next_k, next[group]->k);
  }
};

// `Count` decoded groups of `size` elements each, which begin with element `begin` of k.
template <int Count>
struct DecodedGroups {
  using Pairs = DecodedPairs;
  static constexpr int kCount = Count, kDepth = 2;
  static constexpr int64_t kMostTogether = kTogether;
  const Pairs::Element *first;
  int64_t size, begin;

  void start(int64_t) {}
  template <int>
  void read(int64_t k, Pairs (&pairs)[Count]) {
    const Pairs::Element *place = first + (k - begin) * kColumnGroup;
#pragma GCC unroll 2
    for (int group = 0; group < Count; ++group) pairs[group] = Pairs::load(place + group * size);
  }
  DecodedGroups<1> one(int group) const { return {first + group * size, size, begin}; }
};

// Pair `I` of the octet at k.
template <int I>
VLLM_MS_INLINE void decode_pair(CodedGroups<1> &group, int64_t k, DecodedPairs::Element *decoded) {
  ColumnPairs pairs[1];
  group.template read<I>(k + 2 * I, pairs);
  DecodedPairs::store(pairs[0], decoded + I * kPairElements);
}

// Elements [begin, end) of k of one group.
inline void decode(CodedGroups<1> group, int64_t begin, int64_t end, DecodedPairs::Element *decoded) {
  group.start(begin);
  for (int64_t k = begin; k < end; k += kOctet, decoded += kOctet * kColumnGroup) {
    decode_pair<0>(group, k, decoded);
    decode_pair<1>(group, k, decoded);
    decode_pair<2>(group, k, decoded);
    decode_pair<3>(group, k, decoded);
  }
}

// sums += the products of the pairs that read<I>() gives with those of `MT` tokens.
template <int MT, int I, class Groups>
VLLM_MS_INLINE void multiply_pairs(Groups &groups, int64_t k, const ColumnInput *(&bases)[(MT + 2) / 3], int64_t stride,
                                   ColumnSums (&sum)[MT][Groups::kCount]) {
  typename Groups::Pairs weights[Groups::kCount];
  groups.template read<I>(k, weights);
  add_products<MT>(weights, bases, stride, sum);
#pragma GCC unroll 4
  for (int b = 0; b < (MT + 2) / 3; ++b) bases[b] += 2;
}

// sums of `MT` tokens from `token` on += the products of elements [begin, end) of k.
template <int MT, class Groups>
void multiply_columns(Groups groups, const PackedRows<ColumnInput> &x, int64_t token, int64_t begin, int64_t end,
                      NextBlock &next, float *sums) {
  constexpr int kBases = (MT + 2) / 3;  // a pointer for every 3 tokens: one for each does not fit into the registers
  const ColumnInput *bases[kBases];
#pragma GCC unroll 4
  for (int b = 0; b < kBases; ++b) bases[b] = x.row(token + 3 * b) + begin;
  ColumnSums sum[MT][Groups::kCount];
  float *saved = sums + token * kBlock;
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
#pragma GCC unroll 2
    for (int g = 0; g < Groups::kCount; ++g) {
      if (begin == 0) {
        sum[j][g].clear();
      } else {
        sum[j][g].load(saved + j * kBlock + g * kUp);
      }
    }
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
#pragma GCC unroll 2
    for (int g = 0; g < Groups::kCount; ++g) sum[j][g].store(saved + j * kBlock + g * kUp);
  }
}

// As multiply_columns, both groups together or one after the other.
template <int MT, class Groups>
VLLM_MS_INLINE void multiply_pass(const Groups &groups, const PackedRows<ColumnInput> &x, int64_t token, int64_t begin,
                                  int64_t end, NextBlock &next, float *sums) {
  if constexpr (Groups::kCount == 1 || MT <= Groups::kMostTogether) {
    multiply_columns<MT>(groups, x, token, begin, end, next, sums);
  } else {
    for (int group = 0; group < 2; ++group) {
      multiply_columns<MT>(groups.one(group), x, token, begin, end, next, sums + group * kUp);
    }
  }
}

// The tokens in passes of equally many, or one more.
class Passes {
 public:
  explicit Passes(int64_t tokens) : tokens_(tokens), count_((tokens + kColumnTokens - 1) / kColumnTokens) {}
  // f(first token, tokens)
  template <class F>
  __attribute__((always_inline)) void for_each(F f) const {
    for (int64_t pass = 0, token = 0; pass < count_; ++pass) {
      const int64_t tokens = (tokens_ - token + count_ - pass - 1) / (count_ - pass);
      f(token, tokens);
      token += tokens;
    }
  }
  // How often they will ask for some of the next block.
  template <class Groups>
  int64_t prefetch_shares(int64_t k) const {
    int64_t calls = 0;
    for_each([&](int64_t, int64_t tokens) { calls += tokens <= Groups::kMostTogether ? 1 : Groups::kCount; });
    return calls * ((k + kPrefetchDepth - 1) / kPrefetchDepth);
  }

 private:
  int64_t tokens_, count_;
};

// f(begin, end) for ranges of k.
template <class F>
void for_each_panel(int64_t k, F f) {
  for (int64_t begin = 0; begin == 0 || begin < k; begin += kColumnPanel) f(begin, min64(begin + kColumnPanel, k));
}

// All tokens with elements [begin, end) of k.
template <class Groups>
void multiply_panel(const Groups &groups, int64_t begin, int64_t end, const PackedRows<ColumnInput> &x, NextBlock &next,
                    float *sums) {
  Passes(x.count).for_each([&](int64_t token, int64_t count) {
    with_count<kColumnTokens>(count, [&](auto tokens) {
      multiply_pass<tokens()>(groups, x, token, begin, end, next, sums);
    });
  });
}

template <class Groups>
void multiply_groups(const Groups &groups, int64_t k, const PackedRows<ColumnInput> &x, NextBlock &next, float *sums) {
  for_each_panel(k, [&](int64_t begin, int64_t end) { multiply_panel(groups, begin, end, x, next, sums); });
}

template <int Count>
void multiply_coded(const BlockRows<bf16_coded> &block, const PackedRows<ColumnInput> &x, float *sums) {
  using Element = DecodedPairs::Element;
  const Passes passes(x.count);
  const bool ahead = x.count >= kDecodeTokens;
  NextBlock next(block, ahead ? passes.prefetch_shares<DecodedGroups<Count>>(block.k)
                              : passes.prefetch_shares<CodedGroups<Count>>(block.k));
  const CodedGroups<Count> coded(block.first, block.k);
  if (!ahead) return multiply_groups(coded, block.k, x, next, sums);
  const int64_t size = min64(block.k, kColumnPanel) * kColumnGroup;
  const Scratch scratch(Count * size * sizeof(Element));
  Element *decoded = scratch.as<Element>();
  for_each_panel(block.k, [&](int64_t begin, int64_t end) {
    for (int group = 0; group < Count; ++group) decode(coded.one(group), begin, end, decoded + group * size);
    multiply_panel(DecodedGroups<Count>{decoded, size, begin}, begin, end, x, next, sums);
  });
}

inline void multiply_block(const BlockRows<bf16_columns> &block, const PackedRows<ColumnInput> &x, float *sums) {
  const Passes passes(x.count);
  if (block.count[0] == kColumnGroup && block.count[1] == kColumnGroup) {
    NextBlock next(block, passes.prefetch_shares<WholeGroups<2>>(block.k));
    return multiply_groups(WholeGroups<2>{{block.first[0], block.first[1]}}, block.k, x, next, sums);
  }
  NextBlock next(block, passes.prefetch_shares<PartialGroup>(block.k) * block.groups());
  for (int group = 0; group < block.groups(); ++group) {
    multiply_groups(PartialGroup(block, group), block.k, x, next, sums + group * kUp);
  }
}

inline void multiply_block(const BlockRows<bf16_coded> &block, const PackedRows<ColumnInput> &x, float *sums) {
  return block.groups() == 1 ? multiply_coded<1>(block, x, sums) : multiply_coded<2>(block, x, sums);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif

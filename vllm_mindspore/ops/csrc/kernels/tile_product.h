// The products of linear.cc and moe_experts.cc: a block of a weight's rows with any number of tokens, wherever these are.
// Here for all types, 8 rows at a time, a row's products summed over a vector's lanes; column_product.h for weights in columns.
#pragma once

#include <type_traits>

#include "../parallel.h"
#include "dot_tile.h"
#include "linear_finish.h"
#include "norm_row.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

template <class T>
constexpr bool kInColumns = std::is_same<T, bf16_columns>::value || std::is_same<T, bf16_coded>::value;

constexpr int64_t kPanelBytes = 16 << 10;  // of one tile's weights, to stay in the first-level cache
constexpr int64_t kPanelTokens = 4;        // from here on a tile's weights are read panel by panel

// Rows of packed activations: row i is data + i * stride.
template <class X>
struct PackedRows {
  const X *data;
  int64_t stride, count;

  const X *row(int64_t i) const { return data + i * stride; }
};

// A block of a weight: two groups of up to kUp rows, the second one's sums from kUp on. Gated: rows of gate and of up.
template <class T>
struct BlockRows {
  const T *first[2];
  int64_t count[2];
  int64_t step;  // rows of the weight from one of a group to the next
  int64_t k;
  int64_t next;  // elements to the same rows of the block that comes next, to prefetch; 0: there is none

  const T *row(int group, int64_t i) const { return first[group] + i * step * k; }
  int groups() const { return count[1] == 0 ? 1 : 2; }
};

// `count` rows that follow each other.
template <class T>
VLLM_MS_INLINE BlockRows<T> rows_in_order(const T *first, int64_t count, int64_t k, int64_t next) {
  return {{first, first + kUp * k}, {min64(count, kUp), max64(0, count - kUp)}, 1, k, next};
}

// Elements from one row of packed activations to the next: whole steps, and an odd number of cache lines, or the rows
// that are read side by side would push each other out of the first-level cache.
template <class X>
VLLM_MS_INLINE int64_t packed_stride(int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(X);
  return ((k + kLine - 1) / kLine | 1) * kLine;
}

// As many tokens as have their packed activations within `bytes`, within limits.
VLLM_MS_INLINE int64_t tokens_within(int64_t bytes, int64_t token_bytes) {
  constexpr int64_t kLeast = 24, kMost = 768;
  return max64(kLeast, min64(kMost, bytes / max64(1, token_bytes) / kTileTokens * kTileTokens));
}

// norm.rows rows of norm.x, normalised and times scale(row), as products want them: padded with zeros to `stride`.
template <class X, class Scale>
void pack_rows(const NormArgs &norm, int64_t stride, X *packed, Scale scale) {
  constexpr int64_t kElementsPerChunk = 16384;
  parallel_for(norm.rows, max64(1, kElementsPerChunk / max64(1, norm.width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      X *out = packed + r * stride;
      const float factor = scale(r);
      normalise_row(norm, norm.x + r * norm.width, [out, factor](int64_t i, Vec v, int64_t n) {
        store_part(out + i, v * factor, n);
      });
      std::memset(out + norm.width, 0, (stride - norm.width) * sizeof(X));
    }
  });
}

// 8 weight rows, `step` rows apart, and their last, incomplete step padded with zeros. Rows beyond `count` repeat the
// last one; their results are not used.
template <class T>
struct WeightTile {
  static constexpr int kStep = Packed<T>::kStep;
  const T *rows[kTileRows];
  const T *tail_rows[kTileRows];
  int64_t whole, rest;  // elements in whole steps, and after them
  int64_t next;         // elements to the same rows of the tile that comes next, to prefetch
  bool together;        // the rows follow each other in memory
  alignas(64) T tails[kTileRows * kStep];

  WeightTile(const T *first, const T *next_first, int64_t step, int64_t count, int64_t k)
      : whole(k / kStep * kStep), rest(k % kStep), next(next_first - first), together(step == 1) {
    if (rest != 0) std::memset(tails, 0, sizeof(tails));
    for (int i = 0; i < kTileRows; ++i) {
      rows[i] = first + min64(i, count - 1) * step * k;
      tail_rows[i] = tails + i * kStep;
      if (rest != 0) std::memcpy(tails + i * kStep, rows[i] + whole, rest * sizeof(T));
    }
  }
};

// One range of k of a weight tile, as the inner kernel reads it: from the weights themselves or converted.
template <class T>
struct Panel {
  const T *const *rows;
  int64_t begin, end;
  int64_t next;  // as WeightTile's; 0: do not prefetch
  bool together, first, last;
};

// The next tile, to be prefetched while this one is multiplied: an equal share in each pass over it, for the memory has
// as much time as all of them take. A single pass over rows that are together takes them in the order of the addresses.
template <class T>
struct Ahead {
  const T *places[kTileRows];
  int left = 0, share = 0;
  int64_t advance = Packed<T>::kStep;

  Ahead(const Panel<T> &panel, int64_t passes) {
    if (panel.next == 0) return;
    const bool in_order = passes == 1 && panel.together && panel.first && panel.last;
    for (int i = 0; i < kTileRows; ++i) {
      places[i] = panel.next + (in_order ? panel.rows[0] + i * Packed<T>::kStep : panel.rows[i] + panel.begin);
    }
    if (in_order) advance *= kTileRows;
    left = kTileRows;
    share = passes == 1 ? kTileRows : passes == 2 ? 4 : passes == 3 ? 3 : passes < kTileRows ? 2 : 1;
  }
};

// accumulate() with the next share of `ahead`.
template <int NR, int MT, class T, class X>
VLLM_MS_INLINE void accumulate_ahead(const T *const *rows, const X *const (&tokens)[MT], int64_t begin, int64_t end,
                                     Ahead<T> &ahead, Vec (&acc)[NR][MT]) {
  const T *const *from = ahead.places + kTileRows - ahead.left;
  const int count = ahead.left < ahead.share ? ahead.left : ahead.share;
  ahead.left -= count;
  switch (count) {
    case 0:
      return accumulate<NR, MT, 0>(rows, tokens, begin, end, from, ahead.advance, acc);
    case 1:
      return accumulate<NR, MT, 1>(rows, tokens, begin, end, from, ahead.advance, acc);
    case 2:
      return accumulate<NR, MT, 2>(rows, tokens, begin, end, from, ahead.advance, acc);
    case 3:
      return accumulate<NR, MT, 3>(rows, tokens, begin, end, from, ahead.advance, acc);
    case 4:
      return accumulate<NR, MT, 4>(rows, tokens, begin, end, from, ahead.advance, acc);
    default:
      return accumulate<NR, MT, kTileRows>(rows, tokens, begin, end, from, ahead.advance, acc);
  }
}

// `MT` tokens from `token` on. Sums wait in `partial` between the panels of a tile: out is complete with the last.
template <int MT, class T, class P, class X>
VLLM_MS_INLINE void run_tile(const WeightTile<T> &tile, const Panel<P> &panel, const PackedRows<X> &x, int64_t token,
                             Ahead<P> &ahead, float *partial, float *out) {
  constexpr int NR = rows_at_once(MT);
  const X *tokens[MT], *tails[MT];
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) {
    tokens[j] = x.row(token + j);
    tails[j] = tokens[j] + tile.whole;
  }
  for (int row = 0; row < kTileRows; row += NR) {
    Vec acc[NR][MT];
    float *saved = partial + (token * kTileRows + row) * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) acc[i][j] = panel.first ? zero() : load(saved + (j * kTileRows + i) * kLanes);
    }
    accumulate_ahead<NR, MT>(panel.rows + row, tokens, panel.begin, panel.end, ahead, acc);
    if (!panel.last) {
#pragma GCC unroll 8
      for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < MT; ++j) store(saved + (j * kTileRows + i) * kLanes, acc[i][j]);
      }
      continue;
    }
    if (tile.rest != 0) {
      const T *const *none = nullptr;
      accumulate<NR, MT, 0>(tile.tail_rows + row, tails, 0, WeightTile<T>::kStep, none, 0, acc);
    }
#pragma GCC unroll 8
    for (int j = 0; j < MT; ++j) reduce_rows(acc, j, out + (token + j) * kBlock + row);
  }
}

// Tokens at a time: 3, and at the end 2 or 1; 4 are better served as 2 + 2 than as 3 + 1.
template <class T, class P, class X>
void run_panel(const WeightTile<T> &tile, const Panel<P> &panel, const PackedRows<X> &x, float *partial, float *out) {
  constexpr int kPasses = kTileRows / rows_at_once(kTileTokens);
  Ahead<P> ahead(panel, x.count == 1 ? kTileRows / rows_at_once(1)
                                     : (x.count + kTileTokens - 1) / kTileTokens * kPasses);
  for (int64_t token = 0; token < x.count;) {
    const int64_t left = x.count - token;
    if (left == 3 || left > 4) {
      run_tile<3>(tile, panel, x, token, ahead, partial, out);
      token += 3;
    } else if (left >= 2) {
      run_tile<2>(tile, panel, x, token, ahead, partial, out);
      token += 2;
    } else {
      run_tile<1>(tile, panel, x, token, ahead, partial, out);
      token += 1;
    }
  }
}

// out[t * kBlock + i] = row i of the tile times token t; partial: a vector for each row and token.
template <class T, class X>
void multiply_tile(const WeightTile<T> &tile, const PackedRows<X> &x, float *partial, float *out) {
  constexpr bool converted = !std::is_same<T, float>::value && std::is_same<X, float>::value;
  constexpr int64_t kPanel = kPanelBytes / kTileRows / sizeof(X);
  if (x.count < kPanelTokens || (!converted && tile.whole <= kPanel)) {
    run_panel(tile, Panel<T>{tile.rows, 0, tile.whole, tile.next, tile.together, true, true}, x, partial, out);
    return;
  }
  alignas(64) float panel[converted ? kTileRows * kPanel : 1];
  for (int64_t begin = 0; begin == 0 || begin < tile.whole; begin += kPanel) {
    const int64_t end = min64(begin + kPanel, tile.whole);
    const bool first = begin == 0, last = end == tile.whole;
    if constexpr (converted) {
      const float *rows[kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        float *row = panel + i * kPanel;
        for (int64_t k = begin; k < end; k += kLanes) {
          __builtin_prefetch(tile.rows[i] + k + tile.next, 0, 2);
          store(row + k - begin, load(tile.rows[i] + k));
        }
        rows[i] = row - begin;
      }
      run_panel(tile, Panel<float>{rows, begin, end, 0, false, first, last}, x, partial, out);
    } else {
      run_panel(tile, Panel<T>{tile.rows, begin, end, tile.next, false, first, last}, x, partial, out);
    }
  }
}

// sums[t * kBlock + i] = row i of the block times token t, rows of the second group from kUp on.
template <class T, class X>
void multiply_block(const BlockRows<T> &block, const PackedRows<X> &x, float *sums) {
  const Scratch partial(x.count * kTileRows * sizeof(Vec));
  for (int group = 0; group < block.groups(); ++group) {
    for (int64_t i = 0; i < block.count[group]; i += kTileRows) {
      const T *first = block.row(group, i);
      const T *after = i + kTileRows < block.count[group] ? block.row(group, i + kTileRows)
                       : group + 1 < block.groups()       ? block.first[1]
                                                          : block.first[0] + block.next;
      const WeightTile<T> tile(first, after, block.step, min64(kTileRows, block.count[group] - i), block.k);
      multiply_tile(tile, x, partial.as<float>(), sums + group * kUp + i);
    }
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

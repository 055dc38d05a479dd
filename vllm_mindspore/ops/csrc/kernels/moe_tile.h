// The products of moe_experts.cc: 8 rows of one expert's weight with the tokens it was given, wherever these are.
#pragma once

#include <type_traits>

#include "dot_tile.h"
#include "linear_finish.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int64_t kMoePanelBytes = 16 << 10;  // of one tile's weights, to stay in the first-level cache
constexpr int64_t kMoePanelTokens = 6;        // from here on a tile's weights are read panel by panel

// Rows of packed activations: row i is data + index[i] * stride, or data + i * stride without an index.
template <class X>
struct PackedRows {
  const X *data;
  int64_t stride, count;
  const int32_t *index;

  const X *row(int64_t i) const { return data + (index != nullptr ? index[i] : i) * stride; }
  PackedRows from(int64_t first, int64_t some) const {
    if (index != nullptr) return {data, stride, some, index + first};
    return {data + first * stride, stride, some, nullptr};
  }
};

// 8 weight rows, `step` rows apart, and their last, incomplete step padded with zeros. Rows beyond `count` repeat the
// last one; their results are not used.
template <class T>
struct MoeTile {
  static constexpr int kStep = Packed<T>::kStep;
  const T *rows[kTileRows];
  const T *tail_rows[kTileRows];
  int64_t whole, rest;  // elements in whole steps, and after them
  int64_t next;         // elements to the same rows of the tile that comes next, to prefetch
  alignas(64) T tails[kTileRows * kStep];

  MoeTile(const T *first, const T *next_first, int64_t step, int64_t count, int64_t k)
      : whole(k / kStep * kStep), rest(k % kStep), next(next_first - first) {
    if (rest != 0) std::memset(tails, 0, sizeof(tails));
    for (int i = 0; i < kTileRows; ++i) {
      rows[i] = first + min64(i, count - 1) * step * k;
      tail_rows[i] = tails + i * kStep;
      if (rest != 0) std::memcpy(tails + i * kStep, rows[i] + whole, rest * sizeof(T));
    }
  }
};

// One range of k of a tile, as the inner kernel reads it: from the weights themselves or converted.
template <class T>
struct MoePanel {
  const T *const *rows;
  int64_t begin, end, next;
  bool first, last;
};

// acc[i][j] += rows[i][begin:end] . tokens[j][begin:end]; the range is whole steps.
template <int NR, int MT, bool prefetch, class T, class X>
VLLM_MS_INLINE void accumulate_gathered(const T *const *rows, const X *const (&tokens)[MT], int64_t begin, int64_t end,
                                        int64_t ahead, Vec (&acc)[NR][MT]) {
  const T *row[NR];
  const X *token[MT];
#pragma GCC unroll 8
  for (int i = 0; i < NR; ++i) row[i] = rows[i];
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) token[j] = tokens[j];
  for (int64_t k = begin; k < end; k += Packed<T>::kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < NR; ++i) {
      if (prefetch) __builtin_prefetch(row[i] + k + ahead, 0, 2);
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) acc[i][j] = multiply_add(row[i] + k, token[j] + k, acc[i][j]);
    }
  }
}

// `MT` tokens from `token` on. Sums wait in `partial` between the panels of a tile: out is complete with the last.
template <int MT, bool prefetch, class T, class P, class X>
VLLM_MS_INLINE void multiply_tokens(const MoeTile<T> &tile, const MoePanel<P> &panel, const PackedRows<X> &x,
                                    int64_t token, float *partial, float *out) {
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
    accumulate_gathered<NR, MT, prefetch>(panel.rows + row, tokens, panel.begin, panel.end, panel.next, acc);
    if (!panel.last) {
#pragma GCC unroll 8
      for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < MT; ++j) store(saved + (j * kTileRows + i) * kLanes, acc[i][j]);
      }
      continue;
    }
    if (tile.rest != 0) {
      accumulate_gathered<NR, MT, false>(tile.tail_rows + row, tails, 0, MoeTile<T>::kStep, 0, acc);
    }
#pragma GCC unroll 8
    for (int j = 0; j < MT; ++j) reduce_rows(acc, j, out + (token + j) * kBlock + row);
  }
}

// The next 3, 2 or 1 tokens; returns how many. 4 are better served as 2 + 2 than as 3 + 1.
template <bool prefetch, class T, class P, class X>
VLLM_MS_INLINE int64_t multiply_some(const MoeTile<T> &tile, const MoePanel<P> &panel, const PackedRows<X> &x,
                                     int64_t token, float *partial, float *out) {
  const int64_t left = x.count - token;
  if (left == 3 || left > 4) {
    multiply_tokens<3, prefetch>(tile, panel, x, token, partial, out);
    return 3;
  }
  if (left >= 2) {
    multiply_tokens<2, prefetch>(tile, panel, x, token, partial, out);
    return 2;
  }
  multiply_tokens<1, prefetch>(tile, panel, x, token, partial, out);
  return 1;
}

template <class T, class P, class X>
void multiply_panel(const MoeTile<T> &tile, const MoePanel<P> &panel, const PackedRows<X> &x, float *partial,
                    float *out) {
  int64_t token = panel.next != 0 ? multiply_some<true>(tile, panel, x, 0, partial, out) : 0;
  while (token < x.count) token += multiply_some<false>(tile, panel, x, token, partial, out);
}

// out[t * kBlock + i] = row i of the tile times token t; partial: a vector for each row and token.
template <class T, class X>
void multiply_tile(const MoeTile<T> &tile, const PackedRows<X> &x, float *partial, float *out) {
  constexpr bool converted = !std::is_same<T, float>::value && std::is_same<X, float>::value;
  constexpr int64_t kPanel = kMoePanelBytes / kTileRows / sizeof(X);
  if (x.count < kMoePanelTokens || (!converted && tile.whole <= kPanel)) {
    multiply_panel(tile, MoePanel<T>{tile.rows, 0, tile.whole, tile.next, true, true}, x, partial, out);
    return;
  }
  alignas(64) float panel[converted ? kTileRows * kPanel : 1];
  for (int64_t begin = 0; begin == 0 || begin < tile.whole; begin += kPanel) {
    const int64_t end = min64(begin + kPanel, tile.whole);
    const bool last = end == tile.whole;
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
      multiply_panel(tile, MoePanel<float>{rows, begin, end, 0, begin == 0, last}, x, partial, out);
    } else {
      multiply_panel(tile, MoePanel<T>{tile.rows, begin, end, tile.next, begin == 0, last}, x, partial, out);
    }
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#include "linear.h"

#include <type_traits>

#include "../parallel.h"
#include "dot_tile.h"
#include "linear_amx.h"
#include "linear_finish.h"
#include "norm_row.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kPanelBytes = 16 << 10;    // of one tile's weights, to stay in the first-level cache
constexpr int64_t kPackedBytes = 1 << 20;    // of packed activations, to stay in the second-level cache
constexpr int64_t kMinTokens = 24;
constexpr int64_t kMaxTokens = 768;
constexpr int64_t kPanelTokens = 4;          // from here on a tile's weights are read panel by panel

// Activations of a block of tokens, normalised, converted to X and padded with zeros to whole steps.
template <class X>
struct PackedTokens {
  X *data;
  int64_t tokens, stride;
};

template <class X>
void pack_tokens(const LinearArgs &args, int64_t first, const PackedTokens<X> &packed) {
  const NormArgs norm{nullptr,          nullptr,        0,         args.k,   args.norm_weight,
                      args.norm_bias,   args.norm,      args.eps,  args.norm_offset};
  constexpr int64_t kElementsPerChunk = 16384;
  parallel_for(packed.tokens, max64(1, kElementsPerChunk / max64(1, args.k)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      X *out = packed.data + r * packed.stride;
      normalise_row(norm, args.x + (first + r) * args.k, [out](int64_t i, Vec v, int64_t n) {
        if (n == kLanes) {
          store(out + i, v);
        } else {
          store_n(out + i, v, n);
        }
      });
      std::memset(out + args.k, 0, (packed.stride - args.k) * sizeof(X));
    }
  });
}

// 8 weight rows and their last, incomplete step padded with zeros. Rows beyond the matrix repeat the last one; their
// results are not used.
template <class T>
struct WeightTile {
  static constexpr int kStep = Packed<T>::kStep;
  const T *rows[kTileRows];
  const T *tail_rows[kTileRows];
  int64_t whole, rest;  // elements in whole steps, and after them
  int64_t next_tile;    // elements to the tile below
  alignas(64) T tails[kTileRows * kStep];

  WeightTile(const T *weight, int64_t row, int64_t count, int64_t k)
      : whole(k / kStep * kStep), rest(k % kStep), next_tile(kTileRows * k) {
    if (rest != 0) std::memset(tails, 0, sizeof(tails));
    for (int i = 0; i < kTileRows; ++i) {
      rows[i] = weight + (row + min64(i, count - 1)) * k;
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
  int64_t next_tile;  // distance to the weights of the next tile, to prefetch; 0: do not
  bool first, last;
};

// The rows of the next tile, to be prefetched while this one is multiplied: an equal share in each pass over it, for the
// memory has as much time as all of them take. A single pass prefetches in the order of the addresses.
template <class T>
struct Ahead {
  const T *rows[kTileRows];
  int left = 0, share = 0;

  Ahead(const Panel<T> &panel, int64_t passes) {
    if (panel.next_tile == 0) return;
    for (int i = 0; i < kTileRows; ++i) rows[i] = panel.rows[i] + panel.next_tile;
    left = kTileRows;
    share = passes == 1 ? kTileRows : passes == 2 ? 4 : passes == 3 ? 3 : passes < kTileRows ? 2 : 1;
  }
};

// accumulate() with the next share of `ahead`.
template <int NR, int MT, class T, class X>
VLLM_MS_INLINE void accumulate_ahead(const T *const *rows, const X *x, int64_t ldx, int64_t begin, int64_t end,
                                     Ahead<T> &ahead, Vec (&acc)[NR][MT]) {
  const T *const *from = ahead.rows + kTileRows - ahead.left;
  const int count = ahead.left < ahead.share ? ahead.left : ahead.share;
  ahead.left -= count;
  switch (count) {
    case 0:
      return accumulate<NR, MT, 0>(rows, x, ldx, begin, end, from, acc);
    case 1:
      return accumulate<NR, MT, 1>(rows, x, ldx, begin, end, from, acc);
    case 2:
      return accumulate<NR, MT, 2>(rows, x, ldx, begin, end, from, acc);
    case 3:
      return accumulate<NR, MT, 3>(rows, x, ldx, begin, end, from, acc);
    case 4:
      return accumulate<NR, MT, 4>(rows, x, ldx, begin, end, from, acc);
    default:
      return accumulate<NR, MT, kTileRows>(rows, x, ldx, begin, end, from, acc);
  }
}

// `MT` tokens from `token` on. Sums wait in `partial` between the panels of a tile: out is complete with the last.
template <int MT, class T, class P, class X>
VLLM_MS_INLINE void run_tile(const WeightTile<T> &tile, const Panel<P> &panel, const PackedTokens<X> &x, int64_t token,
                             Ahead<P> &ahead, float *partial, float *out) {
  constexpr int NR = rows_at_once(MT);
  const X *first = x.data + token * x.stride;
  for (int row = 0; row < kTileRows; row += NR) {
    Vec acc[NR][MT];
    float *saved = partial + (token * kTileRows + row) * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) acc[i][j] = panel.first ? zero() : load(saved + (j * kTileRows + i) * kLanes);
    }
    accumulate_ahead<NR, MT>(panel.rows + row, first, x.stride, panel.begin, panel.end, ahead, acc);
    if (!panel.last) {
#pragma GCC unroll 8
      for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < MT; ++j) store(saved + (j * kTileRows + i) * kLanes, acc[i][j]);
      }
      continue;
    }
    if (tile.rest != 0) {
      accumulate<NR, MT, 0, T>(tile.tail_rows + row, first + tile.whole, x.stride, 0, WeightTile<T>::kStep, nullptr,
                               acc);
    }
#pragma GCC unroll 8
    for (int j = 0; j < MT; ++j) reduce_rows(acc, j, out + (token + j) * kBlock + row);
  }
}

// Tokens at a time: 3, and at the end 2 or 1; 4 are better served as 2 + 2 than as 3 + 1.
template <class T, class P, class X>
void run_panel(const WeightTile<T> &tile, const Panel<P> &panel, const PackedTokens<X> &x, float *partial,
               float *out) {
  constexpr int kPasses = kTileRows / rows_at_once(kTileTokens);
  Ahead<P> ahead(panel, x.tokens == 1 ? kTileRows / rows_at_once(1)
                                      : (x.tokens + kTileTokens - 1) / kTileTokens * kPasses);
  for (int64_t token = 0; token < x.tokens;) {
    const int64_t left = x.tokens - token;
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

// out[t * kBlock + i] = row i of the tile times token t.
template <class T, class X>
void multiply_tile(const WeightTile<T> &tile, const PackedTokens<X> &x, float *partial, float *out) {
  constexpr bool converted = !std::is_same<T, float>::value && std::is_same<X, float>::value;
  constexpr int64_t kPanel = kPanelBytes / kTileRows / sizeof(X);
  if (x.tokens < kPanelTokens || (!converted && tile.whole <= kPanel)) {
    run_panel(tile, Panel<T>{tile.rows, 0, tile.whole, tile.next_tile, true, true}, x, partial, out);
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
          __builtin_prefetch(tile.rows[i] + k + tile.next_tile, 0, 2);
          store(row + k - begin, load(tile.rows[i] + k));
        }
        rows[i] = row - begin;
      }
      run_panel(tile, Panel<float>{rows, begin, end, 0, begin == 0, last}, x, partial, out);
    } else {
      run_panel(tile, Panel<T>{tile.rows, begin, end, tile.next_tile, begin == 0, last}, x, partial, out);
    }
  }
}

template <class T>
void multiply_blocks(const LinearArgs &args, int64_t first_token, const PackedTokens<typename Packed<T>::Type> &x) {
  const T *weight = static_cast<const T *>(args.weight.data);
  const BlockLayout layout(args);
  const bool gated = args.activation.gated;
  constexpr int64_t kWorkPerChunk = 1 << 18;  // multiply-adds below which a second thread does not pay
  const int64_t work = max64(1, kBlock * args.k * x.tokens);
  parallel_for(layout.blocks, (kWorkPerChunk + work - 1) / work, [&](int64_t begin, int64_t end) {
    const Scratch sums_buffer(x.tokens * kBlock * sizeof(float));
    const Scratch partial_buffer(x.tokens * kTileRows * sizeof(Vec));
    float *sums = sums_buffer.as<float>();
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = layout.column(block), count = layout.count(block);
      for (int half = 0; half < (gated ? 2 : 1); ++half) {
        for (int64_t i = 0; i < count; i += kTileRows) {
          const WeightTile<T> tile(weight, half * layout.width + column + i, min64(kTileRows, count - i), args.k);
          multiply_tile(tile, x, partial_buffer.as<float>(), sums + half * kUp + i);
        }
      }
      finish_block(args, first_token, x.tokens, column, count, sums);
    }
  });
}

template <class T>
void run(const LinearArgs &args) {
  using X = typename Packed<T>::Type;
  const int64_t stride = round_up(args.k, Packed<T>::kStep);
  const int64_t fitting = kPackedBytes / max64(1, stride * sizeof(X)) / kTileTokens * kTileTokens;
  const int64_t tokens = min64(args.m, max64(kMinTokens, min64(kMaxTokens, fitting)));
  const Scratch buffer(tokens * stride * sizeof(X));
  for (int64_t first = 0; first < args.m; first += tokens) {
    const PackedTokens<X> x{buffer.as<X>(), min64(tokens, args.m - first), stride};
    pack_tokens(args, first, x);
    multiply_blocks<T>(args, first, x);
  }
}

}  // namespace

void linear(const LinearArgs &args) {
  if (args.m == 0 || args.n == 0) return;
#if defined(__AMX_BF16__)
  if (args.weight.dtype == DType::bf16 && args.k > 0) return linear_amx(args);
#endif
  VLLM_MS_DISPATCH_FLOAT(args.weight.dtype, T, { run<T>(args); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

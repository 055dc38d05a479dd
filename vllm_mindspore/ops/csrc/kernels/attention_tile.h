// The three inner loops of attention over one tile of keys: scores, softmax, accumulation.
#pragma once

#include "../vec_math.h"
#include "attention.h"

#define VLLM_MS_NOINLINE __attribute__((noinline, unused))  // not every kernel file uses all of these

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 4;  // 32 vector registers
#else
constexpr int kMaxRows = 2;  // 16 vector registers
#endif

template <int R>
struct Rows {
  static constexpr int value = R;
};

// Calls body(Rows<R>, row) for groups of R = 4, 2 and 1 rows.
template <class Body>
VLLM_MS_INLINE void for_row_groups(int64_t rows, Body body) {
  int64_t row = 0;
  if (kMaxRows >= 4) {
    for (; row + 4 <= rows; row += 4) body(Rows<(kMaxRows >= 4 ? 4 : 1)>{}, row);
  }
  for (; row + 2 <= rows; row += 2) body(Rows<2>{}, row);
  if (row < rows) body(Rows<1>{}, row);
}

// Lane i of the result is the sum of the lanes of v[i]; the order of additions is the same for every i.
VLLM_MS_INLINE Vec sum_each(const Vec *v) {
#if defined(__AVX512F__)
  __m512 quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = reinterpret_cast<__m512>(v[4 * i]), b = reinterpret_cast<__m512>(v[4 * i + 1]);
    const __m512 c = reinterpret_cast<__m512>(v[4 * i + 2]), d = reinterpret_cast<__m512>(v[4 * i + 3]);
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const __m512d low = _mm512_unpacklo_pd(ab, cd), high = _mm512_unpackhi_pd(ab, cd);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return reinterpret_cast<Vec>(
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#elif defined(__AVX2__)
  __m256 quads[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 ab = _mm256_hadd_ps(reinterpret_cast<__m256>(v[4 * i]), reinterpret_cast<__m256>(v[4 * i + 1]));
    const __m256 cd = _mm256_hadd_ps(reinterpret_cast<__m256>(v[4 * i + 2]), reinterpret_cast<__m256>(v[4 * i + 3]));
    quads[i] = _mm256_hadd_ps(ab, cd);
  }
  return reinterpret_cast<Vec>(_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                             _mm256_permute2f128_ps(quads[0], quads[1], 0x31)));
#else
  const Vec a = v[0], b = v[1], c = v[2], d = v[3];
  const IVec low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const Vec ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Vec cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  return __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second);
#endif
}

template <class T>
VLLM_MS_INLINE Vec widen(const T *p) {
  return load(p);
}
VLLM_MS_INLINE Vec widen(const bf16 *p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec>(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16));
#else
  return load(p);
#endif
}

// Memory that will be read soon: `bytes` from rows[j] + offset, one j for each key that is worked on meanwhile.
struct Ahead {
  const char *const *rows;
  int64_t offset, bytes;
};

VLLM_MS_INLINE void prefetch(const Ahead &ahead, int64_t j) {
  for (int64_t byte = 0; byte < ahead.bytes; byte += kLine) {
    __builtin_prefetch(ahead.rows[j] + ahead.offset + byte, 0, 2);
  }
}

// scores[r, j] = query[r] . key[j] for j in [begin, end), and for other j of the tile as it comes. R rows by K keys are
// held in registers; each dot product is one chain of fma over the head, then sum_each, whatever R, K and T.
template <int R, class T>
VLLM_MS_NOINLINE void score_rows(const float *query, int64_t padded, const void *const *keys, int64_t begin,
                                 int64_t end, int64_t head_size, float *scores, Ahead ahead) {
  constexpr int K = R == 4 ? 4 : R == 2 ? (kLanes > 8 ? 8 : 4) : (kLanes > 8 ? 16 : 8);
  for (int64_t j = begin / K * K; j < end; j += K) {
    for (int k = 0; k < K; ++k) prefetch(ahead, j + k);
    Vec sums[R * K] = {};
    for (int64_t d = 0; d < head_size; d += kLanes) {
      Vec q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) q[r] = load(query + r * padded + d);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const Vec key = widen(static_cast<const T *>(keys[j + k]) + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * K + k] = fma(q[r], key, sums[r * K + k]);
      }
    }
    float flat[R * K];
#pragma GCC unroll 4
    for (int i = 0; i < R * K; i += kLanes) store(flat + i, sum_each(sums + i));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTileKeys + j, flat + r * K, K * sizeof(float));
  }
}

// e^x for x <= 0 within 2 ulp, exactly 0 below e^-87: no subnormal, which would be slow, and no trace of masked scores.
// The polynomial is that of vexp; 2^n is one factor here. Keeps NaN.
VLLM_MS_INLINE Vec softmax_exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec clamped = vmax(set1(-87.0f), x);
  const Vec shifted = fma(clamped, set1(1.44269504f), set1(kRound));
  const Vec n = shifted - kRound;
  const Vec r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), clamped));
  const Vec p = polynomial(r, {1.383674162e-03f, 8.374898361e-03f, 4.166823181e-02f, 1.666641919e-01f,
                               4.999999203e-01f, 1.0f, 1.0f});
  const Vec power = as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? zero() : p * power;
}
VLLM_MS_INLINE float softmax_exp(float x) { return softmax_exp(set1(x))[0]; }

VLLM_MS_INLINE float highest_lane(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  return hmax(v);
#endif
}

struct RowState {
  float *accumulator;  // [value_size]
  float *max;
  float *sum;
};

struct Base {
  float value;    // that scores are taken relative to
  float rescale;  // of the sum so far
};

// Raises the row's running maximum to that of `highest`, and rescales its accumulator.
VLLM_MS_INLINE Base raise(const AttentionInputs &in, Vec highest, const RowState &row) {
  const float before = *row.max, top = highest_lane(highest), now = top > before ? top : before;
  Base base{now == -kInfinity ? 0.0f : now, 1.0f};
  if (before != now && before != -kInfinity) {
    base.rescale = softmax_exp(before - now);
    const Vec scales = set1(base.rescale);
    for (int64_t d = 0; d < in.cache.value_size; d += kLanes) {
      store(row.accumulator + d, load(row.accumulator + d) * scales);
    }
  }
  *row.max = now;
  return base;
}

// Turns the scores of keys [begin, end) into weights relative to the row's running maximum, and rescales the row's sum
// and accumulator to it. Weights outside [begin, end) are not to be read. `distance` = position of scores[0] - position
// of the query.
VLLM_MS_NOINLINE void softmax_row(const AttentionInputs &in, float *scores, int64_t begin, int64_t end, float slope,
                                int64_t distance, const RowState &row) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec highest = set1(-kInfinity);
  const int64_t start = begin / kLanes * kLanes;
  for (int64_t j = start; j < end; j += kLanes) {
    Vec x = load(scores + j) * in.scale;
    if (in.soft_cap > 0) x = in.soft_cap * vtanh(x / in.soft_cap);
    const IVec key = lane + static_cast<int32_t>(j);
    if (in.alibi_slopes) {
      x = fma(set1(slope), __builtin_convertvector(key + static_cast<int32_t>(distance), Vec), x);
    }
    if (j < begin || j + kLanes > end) {
      const IVec seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
      x = seen ? x : set1(-kInfinity);
    }
    store(scores + j, x);
    highest = vmax(x, highest);
  }
  const Base base = raise(in, highest, row);
  Vec sum = zero();
  for (int64_t j = start; j < end; j += kLanes) {
    const Vec weight = softmax_exp(load(scores + j) - base.value);
    store(scores + j, weight);
    sum += weight;
  }
  *row.sum = *row.sum * base.rescale + hsum(sum);
}

// accumulator[r, offset : offset + N * kLanes] += weights[r, j] * value[j] for j in [begin, end), ascending: one chain
// of fma per element, so that a range of keys may be cut anywhere.
template <int R, int N, class T>
VLLM_MS_NOINLINE void accumulate(float *accumulator, int64_t padded, const float *weights, const void *const *values,
                                 int64_t begin, int64_t end, int64_t offset, Ahead ahead) {
  Vec sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = load(accumulator + r * padded + offset + n * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    prefetch(ahead, j);
    Vec value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) value[n] = widen(static_cast<const T *>(values[j]) + offset + n * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = set1(weights[r * kTileKeys + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = fma(weight, value[n], sums[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(accumulator + r * padded + offset + n * kLanes, sums[r][n]);
  }
}

template <int R, class T>
void accumulate_rows(float *accumulator, int64_t padded, const float *weights, const void *const *values,
                     int64_t begin, int64_t end, int64_t value_size, Ahead ahead) {
  int64_t d = 0;
  if (R == 1) {
    for (; d + 7 * kLanes < value_size; d += 8 * kLanes) {
      accumulate<R, (R == 1 ? 8 : 1), T>(accumulator, padded, weights, values, begin, end, d, ahead);
      ahead.bytes = 0;
    }
  }
  for (; d + 3 * kLanes < value_size; d += 4 * kLanes) {
    accumulate<R, 4, T>(accumulator, padded, weights, values, begin, end, d, ahead);
    ahead.bytes = 0;
  }
  switch ((value_size - d + kLanes - 1) / kLanes) {
    case 3:
      return accumulate<R, 3, T>(accumulator, padded, weights, values, begin, end, d, ahead);
    case 2:
      return accumulate<R, 2, T>(accumulator, padded, weights, values, begin, end, d, ahead);
    case 1:
      return accumulate<R, 1, T>(accumulator, padded, weights, values, begin, end, d, ahead);
    default:
      return;
  }
}

VLLM_MS_NOINLINE void clear(float *max, float *sum, float *accumulator, int64_t rows, int64_t padded) {
  for (int64_t row = 0; row < rows; ++row) {
    max[row] = -kInfinity;
    sum[row] = 0;
  }
  std::memset(accumulator, 0, rows * padded * sizeof(float));
}

// Folds one split's state into the total. Not inlined: one sequence of instructions for both ways of computing splits.
VLLM_MS_NOINLINE void fold(float max, float sum, const float *accumulator, const RowState &total, int64_t size) {
  if (max == -kInfinity && sum == 0) return;  // no key seen (a NaN in the scores leaves a NaN sum)
  if (*total.max == -kInfinity && *total.sum == 0) {
    *total.max = max;
    *total.sum = sum;
    std::memcpy(total.accumulator, accumulator, size * sizeof(float));
    return;
  }
  const float highest = max > *total.max ? max : *total.max;
  const float base = highest == -kInfinity ? 0.0f : highest;
  const Vec old_scale = softmax_exp(set1(*total.max - base)), new_scale = softmax_exp(set1(max - base));
  for (int64_t d = 0; d < size; d += kLanes) {
    store(total.accumulator + d, fma(load(accumulator + d), new_scale, load(total.accumulator + d) * old_scale));
  }
  *total.sum = fma(set1(sum), new_scale, set1(*total.sum) * old_scale)[0];
  *total.max = highest;
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

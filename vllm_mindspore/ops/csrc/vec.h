// One vector type for all instruction sets, in the namespace of the variant being compiled (see isa.h): a Vec holds
// kLanes floats and has GCC's element-wise operators (+ - * / and comparisons, which give an IVec of 0 / -1).
// Only for files in kernels/.
#pragma once

#ifndef VLLM_MS_ISA
#error "vec.h is for files compiled once per instruction set"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vllm_ms {
namespace VLLM_MS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

VLLM_MS_INLINE Vec set1(float value) { return value - Vec{}; }
VLLM_MS_INLINE Vec zero() { return Vec{}; }

VLLM_MS_INLINE UVec as_bits(Vec v) { return reinterpret_cast<UVec>(v); }
VLLM_MS_INLINE Vec as_float(UVec v) { return reinterpret_cast<Vec>(v); }

// a * b + c, fused where the instruction set has it.
VLLM_MS_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                         reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

VLLM_MS_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
VLLM_MS_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

VLLM_MS_INLINE Vec load(const float *p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

VLLM_MS_INLINE Vec load(const bf16 *p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof(h));
  return as_float(__builtin_convertvector(h, UVec) << 16);
}

VLLM_MS_INLINE Vec load(const fp16 *p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(h)));
#else
  // without subnormal floats on the way: MindSpore's threads may be set to take them for zero
  const UVec wide = __builtin_convertvector(h, UVec);
  const UVec magnitude = wide & 0x7fffu;
  const UVec special = reinterpret_cast<UVec>(magnitude >= 0x7c00u) & 0x38000000u;
  const UVec subnormal = reinterpret_cast<UVec>(magnitude < 0x400u);
  const UVec normal = (magnitude << 13) + 0x38000000u + special;
  const UVec small = as_bits(__builtin_convertvector(reinterpret_cast<IVec>(magnitude), Vec) * 0x1p-24f);
  return as_float((subnormal & small) | (~subnormal & normal) | ((wide & 0x8000u) << 16));
#endif
}

VLLM_MS_INLINE void store(float *p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// As store, but past the caches where the instruction set can and p is aligned to a Vec. Other threads see what was
// written after end_streaming().
VLLM_MS_INLINE void stream(float *p, Vec v) {
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof(v) == 0) {
#if defined(__AVX512F__)
    return _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#else
    return _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#endif
  }
#endif
  store(p, v);
}

VLLM_MS_INLINE void end_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

VLLM_MS_INLINE void store(bf16 *p, Vec v) {
  const UVec bits = as_bits(v);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec is_nan = reinterpret_cast<UVec>((bits & 0x7fffffffu) > 0x7f800000u);
  const HalfVec h = __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), HalfVec);
  std::memcpy(p, &h, sizeof(h));
}

VLLM_MS_INLINE void store(fp16 *p, Vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof(h));
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof(h));
#elif defined(__aarch64__)
  const float16x4_t h = vcvt_f16_f32(reinterpret_cast<float32x4_t>(v));
  std::memcpy(p, &h, sizeof(h));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

// The first n (< kLanes) elements, the other lanes zero; never reads beyond p[n - 1].
template <class T>
VLLM_MS_INLINE Vec load_n(const T *p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
VLLM_MS_INLINE void store_n(T *p, Vec v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// All lanes, or only the first n of them.
template <class T>
VLLM_MS_INLINE Vec load_part(const T *p, int64_t n) {
  return n < kLanes ? load_n(p, n) : load(p);
}

template <class T>
VLLM_MS_INLINE void store_part(T *p, Vec v, int64_t n) {
  if (n < kLanes) {
    store_n(p, v, n);
  } else {
    store(p, v);
  }
}

constexpr int64_t kLine = 64;  // bytes that a prefetch brings

VLLM_MS_INLINE void prefetch_row(const float *row, int64_t size) {
  for (int64_t d = 0; d < size; d += kLine / 4) __builtin_prefetch(row + d);
}

// `size` floats to another type.
template <class T>
VLLM_MS_INLINE void convert(const float *x, int64_t size, T *out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i));
  if (i < size) store_n(out + i, load_n(x + i, size - i), size - i);
}

// Sum of the lanes, always added in the same order: lane i to lane i + kLanes/2, and so on.
VLLM_MS_INLINE float hsum(Vec v) {
#if defined(__AVX512F__)
  v += __builtin_shuffle(v, IVec{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, IVec{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  v += __builtin_shuffle(v, IVec{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  v += __builtin_shuffle(v, IVec{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif defined(__AVX2__)
  v += __builtin_shuffle(v, IVec{4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, IVec{2, 3, 0, 1, 6, 7, 4, 5});
  v += __builtin_shuffle(v, IVec{1, 0, 3, 2, 5, 4, 7, 6});
#else
  v += __builtin_shuffle(v, IVec{2, 3, 0, 1});
  v += __builtin_shuffle(v, IVec{1, 0, 3, 2});
#endif
  return v[0];
}

VLLM_MS_INLINE float hmax(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// Calls function(std::integral_constant<int, count>) for a count of 1 to `Most`.
template <int Most, class F>
VLLM_MS_INLINE void with_count(int64_t count, F function) {
  if constexpr (Most > 0) {
    if (count == Most) return function(std::integral_constant<int, Most>());
    with_count<Most - 1>(count, function);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

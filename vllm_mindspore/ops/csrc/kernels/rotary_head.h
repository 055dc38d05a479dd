// transform_head: the norm and rotation of one head, shared by the kernels of rotary, KV cache and attention.
#pragma once

#include <cmath>

#include "../vec.h"
#include "rotary.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

float inverse_rms(const float *x, int64_t size, float eps) {
  Vec squares = zero();
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (i < size) {
    const Vec v = load_n(x + i, size - i);
    squares = fma(v, v, squares);
  }
  return 1.0f / sqrtf(hsum(squares) / static_cast<float>(size) + eps);
}

template <class T>
VLLM_MS_INLINE void scale_head(const float *x, const T *weight, float offset, float scale, int64_t size, float *out) {
  const Vec scales = set1(scale), offsets = set1(offset);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * scales * (load(weight + i) + offsets));
  if (i < size) {
    const int64_t n = size - i;
    store_n(out + i, load_n(x + i, n) * scales * (load_n(weight + i, n) + offsets), n);
  }
}

template <class T>
VLLM_MS_INLINE void rotate_halves(const float *x, const T *cos_sin, int64_t half, float *out) {
  const T *cosines = cos_sin, *sines = cos_sin + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
    store(out + i, fma(a, c, -(b * s)));
    store(out + half + i, fma(b, c, a * s));
  }
  if (i < half) {
    const int64_t n = half - i;
    const Vec a = load_n(x + i, n), b = load_n(x + half + i, n);
    const Vec c = load_n(cosines + i, n), s = load_n(sines + i, n);
    store_n(out + i, fma(a, c, -(b * s)), n);
    store_n(out + half + i, fma(b, c, a * s), n);
  }
}

template <class T>
VLLM_MS_INLINE void rotate_pairs(const float *x, const T *cos_sin, int64_t half, float *out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    const float c = to_float(cos_sin[i]), s = to_float(cos_sin[half + i]);
    out[2 * i] = a * c - b * s;
    out[2 * i + 1] = b * c + a * s;
  }
}

// Not inlined, so that every caller gets the same instructions and the same bits. x may be out.
__attribute__((noinline)) void transform_head(const HeadTransform &t, int64_t token, int64_t head, const float *x,
                                              float *out) {
  const int64_t size = t.head_size;
  if (t.norm != HeadNorm::none) {
    const bool full = t.norm == HeadNorm::full;
    const float scale = full ? t.inverse_rms[token] : inverse_rms(x, size, t.norm_eps);
    VLLM_MS_DISPATCH_FLOAT(t.norm_weight.dtype, T, {
      const T *weight = static_cast<const T *>(t.norm_weight.data) + (full ? head * size : 0);
      scale_head(x, weight, t.norm_offset, scale, size, out);
    })
    x = out;
  }
  const int64_t rotated = t.cos_sin ? t.rotary_dim : 0;
  if (rotated > 0) {
    VLLM_MS_DISPATCH_FLOAT(t.cos_sin.dtype, T, {
      const T *cos_sin = static_cast<const T *>(t.cos_sin.data) + t.positions[token] * rotated;
      if (t.neox) {
        rotate_halves(x, cos_sin, rotated / 2, out);
      } else {
        rotate_pairs(x, cos_sin, rotated / 2, out);
      }
    })
  }
  if (x != out) std::memcpy(out + rotated, x + rotated, (size - rotated) * sizeof(float));
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

// Elementary functions on Vec. Errors are against the exact value, over all finite floats; tests/ops/native checks them.
// The polynomials are minimax fits on the intervals named.
#pragma once

#include "vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

// Horner's rule, coefficients from the highest power down.
template <int N>
VLLM_MS_INLINE Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec sum = set1(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) sum = fma(sum, x, set1(coefficients[i]));
  return sum;
}

// e^x within 2 ulp (absolute 2e-45 where the result is subnormal); overflows to infinity, keeps NaN.
VLLM_MS_INLINE Vec vexp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  x = vmin(set1(89.0f), vmax(set1(-104.0f), x));
  const Vec n = fma(x, set1(1.44269504f), set1(kRound)) - kRound;
  const Vec r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), x));  // n * ln 2 in two parts
  const Vec p = polynomial(r, {1.383674162e-03f, 8.374898361e-03f, 4.166823181e-02f, 1.666641919e-01f,
                               4.999999203e-01f, 1.0f, 1.0f});
  const IVec power = __builtin_convertvector(n, IVec);
  const IVec half = power >> 1;  // 2^n in two factors, so that subnormal results come out right
  return p * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((power - half + 127) << 23);
}

VLLM_MS_INLINE Vec vsigmoid(Vec x) { return 1.0f / (1.0f + vexp(-x)); }

// Absolute error below 2e-7, relative below 4e-7.
VLLM_MS_INLINE Vec vtanh(Vec x) {
  const Vec square = x * x;
  const Vec small = x * polynomial(square, {-5.852168305e-03f, 2.075362857e-02f, -5.376870460e-02f, 1.333168896e-01f,
                                            -3.333328326e-01f, 1.0f});  // |x| < 0.6
  const Vec large = 1.0f - 2.0f / (vexp(x + x) + 1.0f);
  return square < 0.36f ? small : large;
}

// The standard normal distribution function, (1 + erf(x / sqrt 2)) / 2, with relative accuracy in the left tail too.
VLLM_MS_INLINE Vec vnormal_cdf(Vec x) {
  const Vec u = x * 0.707106781f;
  const Vec square = u * u;
  const Vec erf_half = u * polynomial(square, {0.5f * 7.853860985e-05f, 0.5f * -8.010193514e-04f,
                                               0.5f * 5.188327673e-03f, 0.5f * -2.685381193e-02f,
                                               0.5f * 1.128358515e-01f, 0.5f * -3.761262582e-01f,
                                               0.5f * 1.128379166e+00f});  // |u| <= 1
  const Vec magnitude = u < 0.0f ? -u : u;
  const Vec inverse = 1.0f / vmin(set1(1e4f), vmax(set1(1.0f), magnitude));
  const Vec scaled = polynomial(inverse, {-2.756402559e-02f, 2.183472986e-01f, -7.354360263e-01f, 1.381005089e+00f,
                                          -1.550783802e+00f, 9.598617612e-01f, -1.134671637e-01f, -2.675735706e-01f,
                                          -1.026004681e-03f, 5.642200492e-01f});  // erfc(u) e^(u^2) u, 1 <= u
  const Vec tail = 0.5f * vexp(-square) * inverse * scaled;
  return square <= 1.0f ? 0.5f + erf_half : (u < 0.0f ? tail : 1.0f - tail);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

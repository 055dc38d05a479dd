// Activation functions on Vec; used by activation.cc and by linear.cc's epilogue, so that both give the same bits.
#pragma once

#include "../vec_math.h"
#include "activation.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

template <Activation::Kind kind>
VLLM_MS_INLINE Vec activate(Vec x) {
  switch (kind) {
    case Activation::relu:
      return vmax(zero(), x);
    case Activation::silu:
      return x / (1.0f + vexp(-x));
    case Activation::gelu:
      return x * vnormal_cdf(x);
    case Activation::gelu_tanh:  // x / 2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      return x * vsigmoid(1.59576912f * fma(x * x * x, set1(0.044715f), x));
    case Activation::relu2: {
      const Vec positive = vmax(zero(), x);
      return positive * positive;
    }
    case Activation::sigmoid:
      return vsigmoid(x);
    default:
      return x;
  }
}

// Calls body(std::integral_constant-like tag) with the kind as a compile-time constant.
template <Activation::Kind kind>
struct KindTag {
  static constexpr Activation::Kind value = kind;
};

template <class Body>
VLLM_MS_INLINE void with_activation(Activation::Kind kind, Body body) {
  switch (kind) {
    case Activation::relu:
      return body(KindTag<Activation::relu>{});
    case Activation::silu:
      return body(KindTag<Activation::silu>{});
    case Activation::gelu:
      return body(KindTag<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(KindTag<Activation::gelu_tanh>{});
    case Activation::relu2:
      return body(KindTag<Activation::relu2>{});
    case Activation::sigmoid:
      return body(KindTag<Activation::sigmoid>{});
    default:
      return body(KindTag<Activation::identity>{});
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

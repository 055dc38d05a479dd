// What the linear operators share: activation, norm and the tensors of their prologue and epilogue.
#pragma once

#include "../aot.h"
#include "../kernels/linear.h"

namespace vllm_ms {
namespace aot {

inline Activation read_activation(const Attributes &attributes) {
  Activation activation;
  const std::string text = attributes.text("activation");
  require(parse_activation(text.c_str(), &activation), "unknown activation '", text, "'");
  return activation;
}

// Half of `n`, for gated activations; -1 stays unknown.
inline int64_t half(int64_t n, const char *what) {
  require(n < 0 || n % 2 == 0, what, ": ", n, " is odd, but the activation halves it");
  return n < 0 ? n : n / 2;
}

// x is the first tensor; bias, residual, norm_weight and norm_bias follow one another from `bias` on.
struct FusedLinear {
  Activation activation;
  Norm norm;
  float eps, norm_offset;
  int x = 0, bias, residual, norm_weight, norm_bias;

  FusedLinear(const Attributes &a, int first)
      : activation(read_activation(a)),
        norm(Norm::none),
        eps(a.number("eps")),
        norm_offset(a.number("norm_offset")),
        bias(first),
        residual(first + 1),
        norm_weight(first + 2),
        norm_bias(first + 3) {
    const std::string text = a.text("norm");
    if (text == "rms") norm = Norm::rms;
    if (text == "layer") norm = Norm::layer;
    require(norm != Norm::none || text.empty(), "unknown norm '", text, "'");
  }

  // The output's shape for a weight of n rows of k.
  Shape infer(const Inputs &in, int64_t n, int64_t k) const {
    require_vector(in[bias], n, "bias and rows of weight");
    require_vector(in[norm_weight], k, "norm_weight");
    require_vector(in[norm_bias], k, "norm_bias");
    require(norm != Norm::none || !(in[norm_weight].given || in[norm_bias].given), "norm weights without a norm");
    require(norm == Norm::layer || !in[norm_bias].given, "norm_bias is for layer norm only");
    Shape out = in[x].shape();
    out.back() = activation.gated ? half(n, "rows of weight") : n;
    if (in[residual].given) {
      require_rank(in[residual], in[x].rank, "residual");
      for (int i = 0; i < in[x].rank; ++i) require_equal(in[residual].dim(i), out[i], "residual and output");
    }
    return out;
  }

  LinearArgs arguments(const Inputs &in, void *out, const Weight &weight, int64_t n, int64_t k) const {
    require_f32(in[x], "x");
    for (int i : {bias, norm_weight, norm_bias}) require_float(in[i], "weights");
    if (in[residual].given) require_f32(in[residual], "residual");
    return {in[x].as<float>(), weight, in[bias].weight(), in[residual].as<float>(), static_cast<float *>(out),
            in[x].rows(), n, k, activation, norm, in[norm_weight].weight(), in[norm_bias].weight(), eps, norm_offset};
  }
};

}  // namespace aot
}  // namespace vllm_ms

#include "../kernels/linear.h"

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

Activation read_activation(const Attributes &attributes) {
  Activation activation;
  const std::string text = attributes.text("activation");
  require(parse_activation(text.c_str(), &activation), "unknown activation '", text, "'");
  return activation;
}

// Half of `n`, for gated activations; -1 stays unknown.
int64_t half(int64_t n, const char *what) {
  require(n < 0 || n % 2 == 0, what, ": ", n, " is odd, but the activation halves it");
  return n < 0 ? n : n / 2;
}

struct LinearOp {
  static constexpr const char *kName = "linear";
  static constexpr int kTensors = 6;
  enum { kX, kWeight, kBias, kResidual, kNormWeight, kNormBias };
  Activation activation;
  Norm norm;
  float eps, norm_offset;

  explicit LinearOp(const Attributes &a)
      : activation(read_activation(a)), norm(Norm::none), eps(a.number("eps")), norm_offset(a.number("norm_offset")) {
    const std::string text = a.text("norm");
    if (text == "rms") norm = Norm::rms;
    if (text == "layer") norm = Norm::layer;
    require(norm != Norm::none || text.empty(), "unknown norm '", text, "'");
  }

  Shape infer(const Inputs &in) const {
    require(in[kX].rank >= 1, "x: rank 0");
    require_rank(in[kWeight], 2, "weight");
    const int64_t n = in[kWeight].dim(0), k = in[kWeight].dim(1);
    require_equal(in[kX].dim(-1), k, "last dimension of x and of weight");
    require_vector(in[kBias], n, "bias and rows of weight");
    require_vector(in[kNormWeight], k, "norm_weight");
    require_vector(in[kNormBias], k, "norm_bias");
    require(norm != Norm::none || !(in[kNormWeight].given || in[kNormBias].given), "norm weights without a norm");
    require(norm == Norm::layer || !in[kNormBias].given, "norm_bias is for layer norm only");
    Shape out = in[kX].shape();
    out.back() = activation.gated ? half(n, "rows of weight") : n;
    if (in[kResidual].given) {
      require_rank(in[kResidual], in[kX].rank, "residual");
      for (int i = 0; i < in[kX].rank; ++i) require_equal(in[kResidual].dim(i), out[i], "residual and output");
    }
    return out;
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[kX], "x");
    for (int i : {kWeight, kBias, kNormWeight, kNormBias}) require_float(in[i], "weights");
    if (in[kResidual].given) require_f32(in[kResidual], "residual");
    linear({in[kX].as<float>(), in[kWeight].weight(), in[kBias].weight(), in[kResidual].as<float>(),
            static_cast<float *>(out), in[kX].rows(), in[kWeight].dim(0), in[kWeight].dim(1), activation, norm,
            in[kNormWeight].weight(), in[kNormBias].weight(), eps, norm_offset});
  }
};

struct ActivationOp {
  static constexpr const char *kName = "activation";
  static constexpr int kTensors = 1;
  Activation activation;
  explicit ActivationOp(const Attributes &a) : activation(read_activation(a)) {}
  Shape infer(const Inputs &in) const {
    require(in[0].rank >= 1, "x: rank 0");
    Shape out = in[0].shape();
    if (activation.gated) out.back() = half(out.back(), "last dimension of x");
    return out;
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const int64_t width = in[0].dim(-1) / (activation.gated ? 2 : 1);
    activate_rows({in[0].as<float>(), static_cast<float *>(out), in[0].rows(), width, activation});
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(Linear, vllm_ms::aot::LinearOp)
VLLM_MS_AOT_OPERATOR(Activation, vllm_ms::aot::ActivationOp)

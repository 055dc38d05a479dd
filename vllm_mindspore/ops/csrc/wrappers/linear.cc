#include "linear.h"

namespace vllm_ms {
namespace aot {
namespace {

struct LinearOp {
  static constexpr const char *kName = "linear";
  static constexpr int kTensors = 6;
  enum { kX, kWeight, kBias };
  FusedLinear fused;

  explicit LinearOp(const Attributes &a) : fused(a, kBias) {}

  Shape infer(const Inputs &in) const {
    require(in[kX].rank >= 1, "x: rank 0");
    require_rank(in[kWeight], 2, "weight");
    const int64_t n = in[kWeight].dim(0), k = in[kWeight].dim(1);
    require_equal(in[kX].dim(-1), k, "last dimension of x and of weight");
    return fused.infer(in, n, k);
  }

  void run(const Inputs &in, void *out) const {
    require_matrix_weight(in[kWeight], "weight");
    linear(fused.arguments(in, out, in[kWeight].weight(), in[kWeight].dim(0), in[kWeight].dim(1)));
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

#include "../kernels/norm.h"

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

// Shared by both: x [..., width] float32, optional weight and bias [width].
Shape infer_norm(const Inputs &in) {
  require(in[0].rank >= 1, "x: rank 0");
  require_vector(in[1], in[0].dim(-1), "weight");
  if (in.size() > 2) require_vector(in[2], in[0].dim(-1), "bias");
  return in[0].shape();
}

void run_norm(const Inputs &in, void *out, Norm norm, float eps, float offset) {
  require_f32(in[0], "x");
  require_float(in[1], "weight");
  const Tensor bias = in.size() > 2 ? in[2] : Tensor{};
  require_float(bias, "bias");
  norm_rows({in[0].as<float>(), static_cast<float *>(out), in[0].rows(), in[0].dim(-1), in[1].weight(), bias.weight(),
             norm, eps, offset});
}

struct RmsNormOp {
  static constexpr const char *kName = "rms_norm";
  static constexpr int kTensors = 2;
  float eps, offset;
  explicit RmsNormOp(const Attributes &a) : eps(a.number("eps")), offset(a.number("offset")) {}
  Shape infer(const Inputs &in) const { return infer_norm(in); }
  void run(const Inputs &in, void *out) const { run_norm(in, out, Norm::rms, eps, offset); }
};

struct LayerNormOp {
  static constexpr const char *kName = "layer_norm";
  static constexpr int kTensors = 3;
  float eps;
  explicit LayerNormOp(const Attributes &a) : eps(a.number("eps")) {}
  Shape infer(const Inputs &in) const { return infer_norm(in); }
  void run(const Inputs &in, void *out) const { run_norm(in, out, Norm::layer, eps, 0.0f); }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(RmsNorm, vllm_ms::aot::RmsNormOp)
VLLM_MS_AOT_OPERATOR(LayerNorm, vllm_ms::aot::LayerNormOp)

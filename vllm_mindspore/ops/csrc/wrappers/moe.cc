#include "../aot.h"
#include "../kernels/moe_experts.h"
#include "../kernels/moe_route.h"

namespace vllm_ms {
namespace aot {
namespace {

struct MoeRouteOp {
  static constexpr const char *kName = "moe_route";
  static constexpr int kTensors = 3;
  enum { kLogits, kBias, kExpertScale };
  Scoring scoring;
  bool renormalize, balanced;
  int64_t top_k, groups, topk_groups;
  float scale;

  explicit MoeRouteOp(const Attributes &a)
      : scoring(Scoring::softmax), renormalize(a.flag("renormalize")), balanced(a.flag("balanced")),
        top_k(a.integer("top_k")), groups(a.integer("num_expert_group")), topk_groups(a.integer("topk_group")),
        scale(a.number("scale")) {
    const std::string text = a.text("scoring");
    if (text == "sigmoid") scoring = Scoring::sigmoid;
    require(text == "softmax" || text == "sigmoid", "unknown scoring '", text, "'");
    require(top_k >= 1, "top_k: ", top_k, ", expected 1 or more");
    require(groups >= 1 && topk_groups >= 1 && topk_groups <= groups, "topk_group: ", topk_groups, " of ", groups,
            " groups");
    require(!balanced || top_k % topk_groups == 0, "balanced: top_k ", top_k, " of ", topk_groups, " groups");
  }

  Shape infer(const Inputs &in) const {
    require_rank(in[kLogits], 2, "logits");
    const int64_t experts = in[kLogits].dim(1);
    require_vector(in[kBias], experts, "bias and experts");
    require_vector(in[kExpertScale], experts, "expert_scale and experts");
    require(experts < 0 || experts % groups == 0, experts, " experts do not divide into ", groups, " groups");
    require(experts < 0 || top_k <= experts / groups * topk_groups, "top_k: ", top_k, " of ",
            experts / groups * topk_groups, " experts");
    return {in[kLogits].dim(0), 2 * top_k};
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[kLogits], "logits");
    require_float(in[kBias], "bias");
    require_float(in[kExpertScale], "expert_scale");
    moe_route({in[kLogits].as<float>(), in[kBias].weight(), in[kExpertScale].weight(), static_cast<float *>(out),
               in[kLogits].dim(0), in[kLogits].dim(1), top_k, scoring, renormalize, groups, topk_groups, balanced,
               scale});
  }
};

struct MoeExpertsOp {
  static constexpr const char *kName = "moe_experts";
  static constexpr int kTensors = 9;
  enum { kX, kRouting, kW13, kW2, kW13Bias, kW2Bias, kResidual, kNormWeight, kNormBias };
  Activation activation;
  Norm norm;
  float eps, norm_offset, alpha, beta, limit;
  bool clamped, interleaved, weight_on_input;

  explicit MoeExpertsOp(const Attributes &a)
      : norm(Norm::none), eps(a.number("eps")), norm_offset(a.number("norm_offset")), alpha(a.number("alpha")),
        beta(a.number("beta")), limit(a.number("limit")), clamped(false), interleaved(a.flag("interleaved")),
        weight_on_input(a.flag("weight_on_input")) {
    std::string text = a.text("activation");
    clamped = text == "clamped_silu_and_mul";
    if (clamped) text = "silu_and_mul";
    require(parse_activation(text.c_str(), &activation), "unknown activation '", text, "'");
    require(activation.gated || !interleaved, "interleaved: only with a gated activation");
    text = a.text("norm");
    if (text == "rms") norm = Norm::rms;
    if (text == "layer") norm = Norm::layer;
    require(norm != Norm::none || text.empty(), "unknown norm '", text, "'");
  }

  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    require_rank(in[kRouting], 2, "routing");
    require_rank(in[kW13], 3, "w13");
    require_rank(in[kW2], 3, "w2");
    const int64_t experts = in[kW13].dim(0), width = in[kW2].dim(1), inter = in[kW2].dim(2);
    require_equal(in[kX].dim(0), in[kRouting].dim(0), "rows of x and of routing");
    require_equal(in[kX].dim(1), in[kW13].dim(2), "last dimension of x and of w13");
    require_equal(experts, in[kW2].dim(0), "experts of w13 and of w2");
    require_equal(in[kW13].dim(1), activation.gated ? 2 * inter : inter, "rows of w13 and what w2 takes");
    const int64_t pairs = in[kRouting].dim(1);
    require(pairs < 0 || (pairs > 0 && pairs % 2 == 0), "routing: ", pairs, " columns, expected ids and weights");
    require(pairs < 0 || pairs == 2 || !weight_on_input, "weight_on_input: only with one expert a token");
    require_matrix(in[kW13Bias], experts, in[kW13].dim(1), "w13_bias");
    require_matrix(in[kW2Bias], experts, width, "w2_bias");
    require_vector(in[kNormWeight], in[kX].dim(1), "norm_weight");
    require_vector(in[kNormBias], in[kX].dim(1), "norm_bias");
    require(norm != Norm::none || !(in[kNormWeight].given || in[kNormBias].given), "norm weights without a norm");
    require(norm == Norm::layer || !in[kNormBias].given, "norm_bias is for layer norm only");
    require_matrix(in[kResidual], in[kX].dim(0), width, "residual");
    return {in[kX].dim(0), width};
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[kX], "x");
    require_f32(in[kRouting], "routing");
    if (in[kResidual].given) require_f32(in[kResidual], "residual");
    for (int i : {kW13Bias, kW2Bias, kNormWeight, kNormBias}) require_float(in[i], "weights");
    for (int i : {kW13, kW2}) require_matrix_weight(in[i], "w13 and w2");
    require(in[kW13].dtype == in[kW2].dtype, "w13 and w2: of different types");
    MoeExpertsArgs args{};
    args.x = in[kX].as<float>();
    args.routing = in[kRouting].as<float>();
    args.w13 = in[kW13].weight();
    args.w2 = in[kW2].weight();
    args.w13_bias = in[kW13Bias].weight();
    args.w2_bias = in[kW2Bias].weight();
    args.residual = in[kResidual].as<float>();
    args.out = static_cast<float *>(out);
    args.tokens = in[kX].dim(0);
    args.top_k = in[kRouting].dim(1) / 2;
    args.experts = in[kW13].dim(0);
    args.hidden = in[kX].dim(1);
    args.inter = in[kW2].dim(2);
    args.width = in[kW2].dim(1);
    args.activation = activation;
    args.interleaved = interleaved;
    args.clamped = clamped;
    args.alpha = alpha;
    args.beta = beta;
    args.limit = limit;
    args.weight_on_input = weight_on_input;
    args.norm = norm;
    args.norm_weight = in[kNormWeight].weight();
    args.norm_bias = in[kNormBias].weight();
    args.eps = eps;
    args.norm_offset = norm_offset;
    moe_experts(args);
  }

 private:
  static void require_matrix(const Tensor &t, int64_t rows, int64_t columns, const char *name) {
    if (!t.given) return;
    require_rank(t, 2, name);
    require_equal(t.dim(0), rows, name);
    require_equal(t.dim(1), columns, name);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(MoeRoute, vllm_ms::aot::MoeRouteOp)
VLLM_MS_AOT_OPERATOR(MoeExperts, vllm_ms::aot::MoeExpertsOp)

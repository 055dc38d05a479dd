#include "../moe_place.h"

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

int64_t top_k_of(const Tensor &routing) { return routing.dim(1) / 2; }

void require_routing(const Tensor &routing) {
  require_rank(routing, 2, "routing");
  require(routing.dim(1) < 0 || routing.dim(1) % 2 == 0, "routing: ", routing.dim(1), " columns, expected ids and weights");
}

struct MoeCountOp {
  static constexpr const char *kName = "moe_count";
  static constexpr int kTensors = 1;
  int64_t experts;
  explicit MoeCountOp(const Attributes &a) : experts(a.integer("experts")) {
    require(experts >= 1, "experts: ", experts, ", expected 1 or more");
  }

  Shape infer(const Inputs &in) const {
    require_routing(in[0]);
    return {experts};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "routing");
    moe_count(in[0].as<float>(), in[0].dim(0), top_k_of(in[0]), experts, static_cast<float *>(out));
  }
};

struct MoePlaceOp {
  static constexpr const char *kName = "moe_place";
  static constexpr int kTensors = 2;
  explicit MoePlaceOp(const Attributes &) {}

  Shape infer(const Inputs &in) const {
    require_routing(in[0]);
    require_rank(in[1], 2, "expert_map");
    return in[0].shape();
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "routing");
    require(in[1].dtype == DType::i32, "expert_map: must be int32");
    moe_place(in[0].as<float>(), in[0].dim(0), top_k_of(in[0]), in[1].as<int32_t>(), in[1].dim(0), in[1].dim(1),
              static_cast<float *>(out));
  }
};

struct MoeLocalOp {
  static constexpr const char *kName = "moe_local";
  static constexpr int kTensors = 1;
  int64_t first, count;
  explicit MoeLocalOp(const Attributes &a) : first(a.integer("first")), count(a.integer("count")) {}

  Shape infer(const Inputs &in) const {
    require_routing(in[0]);
    return in[0].shape();
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "routing");
    moe_local(in[0].as<float>(), in[0].dim(0), top_k_of(in[0]), first, count, static_cast<float *>(out));
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(MoeCount, vllm_ms::aot::MoeCountOp)
VLLM_MS_AOT_OPERATOR(MoePlace, vllm_ms::aot::MoePlaceOp)
VLLM_MS_AOT_OPERATOR(MoeLocal, vllm_ms::aot::MoeLocalOp)

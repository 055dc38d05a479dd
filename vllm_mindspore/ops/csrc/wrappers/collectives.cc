#include "named_group.h"

namespace vllm_ms {
namespace aot {
namespace {

struct AllReduceOp : NamedGroup {
  static constexpr const char *kName = "all_reduce";
  static constexpr int kTensors = 1;
  using NamedGroup::NamedGroup;

  Shape infer(const Inputs &in) const { return in[0].shape(); }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    joined().all_reduce(in[0].data, in[0].numel(), DType::f32, out);
  }
};

struct Resizing : NamedGroup, PartsAlong {
  explicit Resizing(const Attributes &a) : NamedGroup(a), PartsAlong(a) {}
};

struct AllGatherOp : Resizing {
  static constexpr const char *kName = "all_gather";
  static constexpr int kTensors = 1;
  using Resizing::Resizing;

  Shape infer(const Inputs &in) const { return gathered(in[0]); }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides whole = sides(in[0]);
    joined(size).all_gather(in[0].data, whole.outer, whole.inner, DType::f32, out);
  }
};

struct ReduceScatterOp : Resizing {
  static constexpr const char *kName = "reduce_scatter";
  static constexpr int kTensors = 1;
  using Resizing::Resizing;

  Shape infer(const Inputs &in) const { return scattered(in[0]); }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides whole = sides(in[0]);
    joined(size).reduce_scatter(in[0].data, whole.outer, whole.inner / size, DType::f32, out);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(AllReduce, vllm_ms::aot::AllReduceOp)
VLLM_MS_AOT_OPERATOR(AllGather, vllm_ms::aot::AllGatherOp)
VLLM_MS_AOT_OPERATOR(ReduceScatter, vllm_ms::aot::ReduceScatterOp)

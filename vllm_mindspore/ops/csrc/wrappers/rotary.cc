#include "../kernels/rotary.h"

#include "../aot.h"
#include "../attention_plan.h"

namespace vllm_ms {
namespace aot {
namespace {

struct RotaryOp {
  static constexpr const char *kName = "rotary";
  static constexpr int kTensors = 3;
  enum { kPositions, kX, kCosSin };
  int64_t head_size, rotary_dim;
  bool neox;

  explicit RotaryOp(const Attributes &a)
      : head_size(a.integer("head_size")), rotary_dim(a.integer("rotary_dim")), neox(a.flag("neox")) {
    require(head_size > 0, "head_size ", head_size);
    require(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= head_size, "rotary_dim ", rotary_dim,
            ", expected an even number up to head_size ", head_size);
  }

  Shape infer(const Inputs &in) const {
    const Tensor &x = in[kX];
    require(x.rank == 2 || x.rank == 3, "x: rank ", x.rank, ", expected 2 or 3");
    if (x.rank == 3) require_equal(x.dim(2), head_size, "x: last dimension and head_size");
    if (x.rank == 2) {
      require(x.dim(1) < 0 || x.dim(1) % head_size == 0, "x: width ", x.dim(1), ", head_size ", head_size);
    }
    require_rank(in[kPositions], 1, "positions");
    require_equal(in[kPositions].dim(0), x.dim(0), "positions and x: number of tokens");
    require_rank(in[kCosSin], 2, "cos_sin");
    require_equal(in[kCosSin].dim(1), rotary_dim, "cos_sin: width and rotary_dim");
    return x.shape();
  }

  void run(const Inputs &in, void *out) const {
    const Tensor &x = in[kX];
    require_f32(x, "x");
    require_float(in[kCosSin], "cos_sin");
    require(in[kPositions].dtype == DType::i64, "positions: must be int64");
    const int64_t tokens = x.dim(0), width = tokens == 0 ? 0 : x.numel() / tokens;
    const int64_t *positions = in[kPositions].as<int64_t>();
    check_positions(positions, 0, tokens, in[kCosSin].dim(0), nullptr);
    TransformHeadsArgs args{};
    args.transform.head_size = head_size;
    args.transform.positions = positions;
    args.transform.cos_sin = in[kCosSin].weight();
    args.transform.rotary_dim = rotary_dim;
    args.transform.neox = neox;
    args.x = x.as<float>();
    args.x_stride = width;
    args.out = static_cast<float *>(out);
    args.out_stride = width;
    args.num_heads = width / head_size;
    args.end = tokens;
    rotary(args);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(Rotary, vllm_ms::aot::RotaryOp)

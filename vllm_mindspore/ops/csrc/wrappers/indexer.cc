#include "../indexer_plan.h"

#include "step.h"

namespace vllm_ms {
namespace aot {
namespace {

struct LightningIndexerOp {
  static constexpr const char *kName = "lightning_indexer";
  static constexpr int kTensors = 11;
  enum {
    kQuery, kKeyWeights, kPositions, kCosSin, kNorm, kNormBias, kCache, kSlots, kBlockTable, kQueryStartLoc, kSeqLens
  };
  int64_t num_heads, head_dim, rope_dim, top_k, block_size;
  bool neox;
  float norm_eps;

  explicit LightningIndexerOp(const Attributes &a)
      : num_heads(a.integer("num_heads")),
        head_dim(a.integer("head_dim")),
        rope_dim(a.integer("rope_dim")),
        top_k(a.integer("top_k")),
        block_size(a.integer("block_size")),
        neox(a.flag("neox")),
        norm_eps(a.number("norm_eps")) {
    require(num_heads > 0 && head_dim > 0 && top_k > 0 && block_size > 0, "num_heads ", num_heads, ", head_dim ",
            head_dim, ", top_k ", top_k, ", block_size ", block_size);
    require(rope_dim > 0 && rope_dim % 2 == 0 && rope_dim <= head_dim, "rope_dim ", rope_dim, ", head_dim ", head_dim);
  }

  static RequestTensors requests(const Inputs &in) {
    return {in[kBlockTable], in[kQueryStartLoc], in[kSeqLens]};
  }

  Shape infer(const Inputs &in) const {
    require_rank(in[kQuery], 2, "query");
    require_equal(in[kQuery].dim(1), num_heads * head_dim, "query: width and num_heads * head_dim");
    require_rank(in[kKeyWeights], 2, "key_weights");
    require_equal(in[kKeyWeights].dim(1), head_dim + num_heads, "key_weights: width and head_dim + num_heads");
    for (int i : {kKeyWeights, kPositions, kSlots}) {
      require_equal(in[i].dim(0), in[kQuery].dim(0), "key_weights, positions, slot_mapping and query: tokens");
    }
    require_rank(in[kPositions], 1, "positions");
    require_rank(in[kSlots], 1, "slot_mapping");
    require_rank(in[kCosSin], 2, "cos_sin");
    require_equal(in[kCosSin].dim(1), rope_dim, "cos_sin: width and rope_dim");
    require_vector(in[kNorm], head_dim, "key_norm");
    require_vector(in[kNormBias], head_dim, "key_norm_bias");
    require_rank(in[kCache], 3, "kv_cache");
    require_equal(in[kCache].dim(1), 1, "kv_cache: heads");
    require_equal(in[kCache].dim(2), head_dim, "kv_cache: width and head_dim");
    requests(in).infer();
    return {in[kQuery].dim(0), top_k};
  }

  void run(const Inputs &in, void *out) const {
    for (int i : {kQuery, kKeyWeights}) require_f32(in[i], "query and key_weights");
    for (int i : {kCosSin, kNorm, kNormBias}) require_float(in[i], "cos_sin, key_norm and key_norm_bias");
    require_float(in[kCache], "kv_cache");
    IndexerInputs inputs{};
    AttentionInputs &step = inputs.step;
    step.query = in[kQuery].as<float>();
    step.query_stride = num_heads * head_dim;
    step.num_tokens = in[kQuery].dim(0);
    step.cache = {in[kCache].data, in[kCache].dtype, in[kCache].dim(0), 1, head_dim, 0};
    requests(in).fill(step);
    step.num_heads = num_heads;
    step.block_size = block_size;
    inputs.rotation.head_size = head_dim;
    inputs.rotation.positions = in[kPositions].as<int64_t>();
    inputs.rotation.cos_sin = in[kCosSin].weight();
    inputs.rotation.rotary_dim = rope_dim;
    inputs.rotation.neox = neox;
    inputs.key_weights = in[kKeyWeights].as<float>();
    inputs.key_weights_stride = head_dim + num_heads;
    inputs.key_norm.width = head_dim;
    inputs.key_norm.weight = in[kNorm].weight();
    inputs.key_norm.bias = in[kNormBias].weight();
    inputs.key_norm.norm = Norm::layer;
    inputs.key_norm.eps = norm_eps;
    inputs.slot_mapping = in[kSlots].as<int64_t>();
    inputs.top_k = top_k;
    check_indexer(inputs);
    check_tokens(step, in[kSlots], in[kPositions], in[kCosSin]);
    lightning_indexer(inputs, static_cast<float *>(out));
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(LightningIndexer, vllm_ms::aot::LightningIndexerOp)

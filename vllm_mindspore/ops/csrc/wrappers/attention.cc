#include "../kernels/attention.h"

#include "../parallel.h"
#include "step.h"

namespace vllm_ms {
namespace aot {
namespace {

// The arguments that paged_attention and qkv_attention share: attributes, and the tensors that describe the step.
struct AttentionAttributes {
  int64_t num_heads, num_kv_heads, head_size, block_size, sliding_window;
  float scale, soft_cap;

  explicit AttentionAttributes(const Attributes &a)
      : num_heads(a.integer("num_heads")),
        num_kv_heads(a.integer("num_kv_heads")),
        head_size(a.integer("head_size")),
        block_size(a.integer("block_size")),
        sliding_window(a.integer("sliding_window")),
        scale(a.number("scale")),
        soft_cap(a.number("soft_cap")) {
    require(head_size > 0, "head_size ", head_size);
    require(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0, "num_heads ", num_heads,
            " is not a multiple of num_kv_heads ", num_kv_heads);
    require(block_size > 0, "block_size ", block_size);
    require(sliding_window >= 0, "sliding_window ", sliding_window);
    require(soft_cap >= 0, "soft_cap ", soft_cap);
  }
};

struct StepTensors {
  const Tensor &cache;
  RequestTensors requests;
  const Tensor &sinks, &alibi_slopes, &sink_kv;

  void infer(const AttentionAttributes &a) const {
    require_rank(cache, 3, "kv_cache");
    require_equal(cache.dim(1), a.num_kv_heads, "kv_cache: heads and num_kv_heads");
    require(a.head_size < cache.dim(2) && cache.dim(2) <= 2 * a.head_size, "kv_cache: width ", cache.dim(2),
            " for a key of head_size ", a.head_size, " and a value that is not wider");
    requests.infer();
    require_vector(sinks, a.num_heads, "sinks");
    require_vector(alibi_slopes, a.num_heads, "alibi_slopes");
    if (sink_kv.given) {
      require(!alibi_slopes.given && a.sliding_window == 0, "sink_kv with alibi_slopes or a sliding window");
      require_rank(sink_kv, 3, "sink_kv");
      for (int i : {1, 2}) require_equal(sink_kv.dim(i), cache.dim(i), "sink_kv and kv_cache: heads, width");
    }
  }

  int64_t value_size(const AttentionAttributes &a) const { return cache.dim(2) - a.head_size; }

  AttentionInputs inputs(const AttentionAttributes &a) const {
    require_float(cache, "kv_cache");
    require_float(sinks, "sinks");
    require_float(alibi_slopes, "alibi_slopes");
    AttentionInputs in;
    in.cache = {cache.data, cache.dtype, cache.dim(0), a.num_kv_heads, a.head_size, value_size(a)};
    requests.fill(in);
    in.sinks = sinks.weight();
    in.alibi_slopes = alibi_slopes.weight();
    if (sink_kv.given) {
      require(sink_kv.dtype == cache.dtype, "sink_kv: must have the type of kv_cache");
      in.sink_kv = sink_kv.data;
      in.num_sinks = sink_kv.dim(0);
    }
    in.num_heads = a.num_heads;
    in.block_size = a.block_size;
    in.sliding_window = a.sliding_window;
    in.scale = a.scale;
    in.soft_cap = a.soft_cap;
    return in;
  }
};

struct PagedAttentionOp {
  static constexpr const char *kName = "paged_attention";
  static constexpr int kTensors = 8;
  enum { kQuery, kCache, kBlockTable, kQueryStartLoc, kSeqLens, kSinks, kAlibi, kSinkKv };
  AttentionAttributes attributes;

  explicit PagedAttentionOp(const Attributes &a) : attributes(a) {}

  static StepTensors step(const Inputs &in) {
    return {in[kCache], {in[kBlockTable], in[kQueryStartLoc], in[kSeqLens]}, in[kSinks], in[kAlibi], in[kSinkKv]};
  }

  Shape infer(const Inputs &in) const {
    const Tensor &query = in[kQuery];
    const int64_t width = attributes.num_heads * attributes.head_size;
    require(query.rank == 2 || query.rank == 3, "query: rank ", query.rank, ", expected 2 or 3");
    if (query.rank == 2) require_equal(query.dim(1), width, "query: width and num_heads * head_size");
    if (query.rank == 3) {
      require_equal(query.dim(1), attributes.num_heads, "query: heads and num_heads");
      require_equal(query.dim(2), attributes.head_size, "query: last dimension and head_size");
    }
    step(in).infer(attributes);
    return {query.dim(0), attributes.num_heads * step(in).value_size(attributes)};
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[kQuery], "query");
    AttentionInputs inputs = step(in).inputs(attributes);
    inputs.query = in[kQuery].as<float>();
    inputs.query_stride = attributes.num_heads * attributes.head_size;
    inputs.num_tokens = in[kQuery].dim(0);
    inputs.out = static_cast<float *>(out);
    check_attention(inputs);
    attention(inputs);
  }
};

struct QkvAttentionOp {
  static constexpr const char *kName = "qkv_attention";
  static constexpr int kTensors = 13;
  enum {
    kQkv, kPositions, kCosSin, kQNorm, kKNorm, kCache, kSlots, kBlockTable, kQueryStartLoc, kSeqLens, kSinks, kAlibi,
    kSinkKv
  };
  AttentionAttributes attributes;
  int64_t rotary_dim;
  bool neox;
  float norm_eps, norm_offset;
  HeadNorm norm;

  explicit QkvAttentionOp(const Attributes &a)
      : attributes(a),
        rotary_dim(a.integer("rotary_dim")),
        neox(a.flag("neox")),
        norm_eps(a.number("norm_eps")),
        norm_offset(a.number("norm_offset")),
        norm(parse_norm(a.text("norm"))) {}

  static HeadNorm parse_norm(const std::string &name) {
    if (name.empty()) return HeadNorm::none;
    if (name == "head") return HeadNorm::head;
    if (name == "full") return HeadNorm::full;
    fail("norm '", name, "', expected '', 'head' or 'full'");
  }

  static StepTensors step(const Inputs &in) {
    return {in[kCache], {in[kBlockTable], in[kQueryStartLoc], in[kSeqLens]}, in[kSinks], in[kAlibi], in[kSinkKv]};
  }

  int64_t query_width() const { return attributes.num_heads * attributes.head_size; }
  int64_t key_width() const { return attributes.num_kv_heads * attributes.head_size; }
  int64_t value_width(const Inputs &in) const { return attributes.num_kv_heads * step(in).value_size(attributes); }

  Shape infer(const Inputs &in) const {
    require_rank(in[kQkv], 2, "qkv");
    require_rank(in[kPositions], 1, "positions");
    require_equal(in[kPositions].dim(0), in[kQkv].dim(0), "positions and qkv: number of tokens");
    require_rank(in[kSlots], 1, "slot_mapping");
    require_equal(in[kSlots].dim(0), in[kQkv].dim(0), "slot_mapping and qkv: number of tokens");
    if (in[kCosSin].given) {
      require(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= attributes.head_size, "rotary_dim ", rotary_dim,
              ", expected an even number up to head_size ", attributes.head_size);
      require_rank(in[kCosSin], 2, "cos_sin");
      require_equal(in[kCosSin].dim(1), rotary_dim, "cos_sin: width and rotary_dim");
    }
    require((in[kQNorm].given || in[kKNorm].given) == (norm != HeadNorm::none),
            "q_norm or k_norm is needed with norm, and only then");
    const bool full = norm == HeadNorm::full;
    require_vector(in[kQNorm], full ? query_width() : attributes.head_size, "q_norm");
    require_vector(in[kKNorm], full ? key_width() : attributes.head_size, "k_norm");
    step(in).infer(attributes);
    require_equal(in[kQkv].dim(1), query_width() + key_width() + value_width(in),
                  "qkv: width and that of queries, keys and values");
    return {in[kQkv].dim(0), attributes.num_heads * step(in).value_size(attributes)};
  }

  HeadTransform transform(const Inputs &in, const Tensor &weight, const float *inverse_rms) const {
    HeadTransform t;
    t.head_size = attributes.head_size;
    t.norm = weight.given ? norm : HeadNorm::none;
    t.norm_weight = weight.weight();
    t.norm_eps = norm_eps;
    t.norm_offset = norm_offset;
    t.inverse_rms = inverse_rms;
    t.positions = in[kPositions].as<int64_t>();
    t.cos_sin = in[kCosSin].weight();
    t.rotary_dim = rotary_dim;
    t.neox = neox;
    return t;
  }

  void check(const Inputs &in, const AttentionInputs &inputs) const {
    require_f32(in[kQkv], "qkv");
    for (int i : {kCosSin, kQNorm, kKNorm}) require_float(in[i], "cos_sin, q_norm and k_norm");
    check_attention(inputs);
    check_tokens(inputs, in[kSlots], in[kPositions], in[kCosSin]);
  }

  void run(const Inputs &in, void *out) const {
    AttentionInputs inputs = step(in).inputs(attributes);
    const float *qkv = in[kQkv].as<float>();
    const int64_t tokens = in[kQkv].dim(0), stride = query_width() + key_width() + value_width(in);
    inputs.num_tokens = tokens;
    check(in, inputs);

    const Scratch scales(norm == HeadNorm::full ? 2 * tokens * sizeof(float) : 0);
    float *query_scales = scales.as<float>(), *key_scales = query_scales + tokens;
    if (norm == HeadNorm::full && in[kQNorm].given) {
      inverse_rms({qkv, stride, query_width(), norm_eps, query_scales, 0, tokens});
    }
    if (norm == HeadNorm::full && in[kKNorm].given) {
      inverse_rms({qkv + query_width(), stride, key_width(), norm_eps, key_scales, 0, tokens});
    }
    const bool rotated = in[kCosSin].given;
    const HeadTransform key = transform(in, in[kKNorm], key_scales);
    const HeadTransform query = transform(in, in[kQNorm], query_scales);
    const float *keys = qkv + query_width(), *values = keys + key_width();
    kv_write({inputs.cache, keys, stride, values, stride, in[kSlots].as<int64_t>(),
              rotated || in[kKNorm].given ? &key : nullptr, nullptr, 0, tokens});
    inputs.query = qkv;
    inputs.query_stride = stride;
    inputs.query_transform = rotated || in[kQNorm].given ? &query : nullptr;
    inputs.out = static_cast<float *>(out);
    attention(inputs);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(PagedAttention, vllm_ms::aot::PagedAttentionOp)
VLLM_MS_AOT_OPERATOR(QkvAttention, vllm_ms::aot::QkvAttentionOp)

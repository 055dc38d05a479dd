#include "../kernels/mla.h"

#include "../mla_plan.h"
#include "../parallel.h"
#include "step.h"

namespace vllm_ms {
namespace aot {
namespace {

// The arguments that mla_attention and mla_qkv_attention share: attributes, and the tensors that describe the step.
struct MlaAttributes {
  int64_t num_heads, nope, rope, v, lora, block_size;
  float scale;

  explicit MlaAttributes(const Attributes &a)
      : num_heads(a.integer("num_heads")),
        nope(a.integer("nope_dim")),
        rope(a.integer("rope_dim")),
        v(a.integer("v_dim")),
        lora(a.integer("kv_lora_rank")),
        block_size(a.integer("block_size")),
        scale(a.number("scale")) {
    require(num_heads > 0 && nope > 0 && rope >= 0 && v > 0 && lora > 0, "num_heads ", num_heads, ", nope_dim ", nope,
            ", rope_dim ", rope, ", v_dim ", v, ", kv_lora_rank ", lora);
    require(block_size > 0, "block_size ", block_size);
  }

  int64_t query_width() const { return num_heads * (nope + rope); }
  int64_t row() const { return lora + rope; }
};

void infer_cache(const Tensor &cache, int64_t row) {
  require_rank(cache, 3, "kv_cache");
  require_equal(cache.dim(1), 1, "kv_cache: heads");
  require_equal(cache.dim(2), row, "kv_cache: width and kv_lora_rank + rope_dim");
}

struct MlaTensors {
  const Tensor &query, &kv_b, &cache, &selected;
  RequestTensors requests;

  Shape infer(const MlaAttributes &a) const {
    require(query.rank == 2 || query.rank == 3, "query: rank ", query.rank, ", expected 2 or 3");
    if (query.rank == 2) require_equal(query.dim(1), a.query_width(), "query: width and heads * (nope + rope)");
    if (query.rank == 3) {
      require_equal(query.dim(1), a.num_heads, "query: heads and num_heads");
      require_equal(query.dim(2), a.nope + a.rope, "query: last dimension and nope_dim + rope_dim");
    }
    require_rank(kv_b, 2, "kv_b");
    require_equal(kv_b.dim(0), a.num_heads * (a.nope + a.v), "kv_b: rows and heads * (nope_dim + v_dim)");
    require_equal(kv_b.dim(1), a.lora, "kv_b: columns and kv_lora_rank");
    infer_cache(cache, a.row());
    if (selected.given) {
      require_rank(selected, 2, "selected");
      require_equal(selected.dim(0), query.dim(0), "selected and query: number of tokens");
    }
    requests.infer();
    return {query.dim(0), a.num_heads * a.v};
  }

  MlaInputs inputs(const MlaAttributes &a, void *out) const {
    require_f32(query, "query");
    require_float(kv_b, "kv_b");
    require_float(cache, "kv_cache");
    MlaInputs in{};
    AttentionInputs &step = in.step;
    step.query = query.as<float>();
    step.query_stride = a.query_width();
    step.num_tokens = query.dim(0);
    step.cache = {cache.data, cache.dtype, cache.dim(0), 1, a.row()};
    requests.fill(step);
    step.num_heads = a.num_heads;
    step.block_size = a.block_size;
    step.scale = a.scale;
    step.out = static_cast<float *>(out);
    in.kv_b = kv_b.weight();
    in.nope = a.nope;
    in.rope = a.rope;
    in.v = a.v;
    in.lora = a.lora;
    if (selected.given) {
      require_f32(selected, "selected");
      in.selected = selected.as<float>();
      in.top_k = selected.dim(1);
    }
    return in;
  }
};

struct MlaKvWriteOp {
  static constexpr const char *kName = "mla_kv_write";
  static constexpr int kTensors = 4;
  enum { kCache, kLatent, kKeyPart, kSlots };

  explicit MlaKvWriteOp(const Attributes &) {}

  // The schema has no result; MindSpore wants one: [1] float32, zero.
  Shape infer(const Inputs &in) const {
    const Tensor &latent = in[kLatent], &k_pe = in[kKeyPart];
    require_rank(in[kSlots], 1, "slot_mapping");
    require_rank(latent, 2, "kv_c");
    require(k_pe.rank == 2 || (k_pe.rank == 3 && k_pe.dim(1) == 1),
            "k_pe: expected [tokens, rope] or [tokens, 1, rope]");
    require_equal(latent.dim(0), in[kSlots].dim(0), "kv_c and slot_mapping");
    require_equal(k_pe.dim(0), in[kSlots].dim(0), "k_pe and slot_mapping");
    const bool known = latent.dim(1) >= 0 && k_pe.dim(-1) >= 0;
    infer_cache(in[kCache], known ? latent.dim(1) + k_pe.dim(-1) : -1);
    return {1};
  }

  void run(const Inputs &in, void *out) const {
    const Tensor &cache = in[kCache];
    require_f32(in[kLatent], "kv_c");
    require_f32(in[kKeyPart], "k_pe");
    require_float(cache, "kv_cache");
    require(in[kSlots].dtype == DType::i64, "slot_mapping: must be int64");
    MlaWriteArgs args{};
    args.cache = cache.data;
    args.dtype = cache.dtype;
    args.num_slots = cache.dim(0);
    args.lora = args.kv_c_stride = in[kLatent].dim(1);
    args.rope = args.k_pe_stride = in[kKeyPart].dim(-1);
    args.kv_c = in[kLatent].as<float>();
    args.k_pe = in[kKeyPart].as<float>();
    args.slot_mapping = in[kSlots].as<int64_t>();
    args.end = in[kSlots].dim(0);
    check_slots(args.slot_mapping, args.end, args.num_slots);
    mla_write(args);
    *static_cast<float *>(out) = 0;
  }
};

struct MlaAttentionOp {
  static constexpr const char *kName = "mla_attention";
  static constexpr int kTensors = 7;
  enum { kQuery, kKvB, kCache, kBlockTable, kQueryStartLoc, kSeqLens, kSelected };
  MlaAttributes attributes;

  explicit MlaAttentionOp(const Attributes &a) : attributes(a) {}

  static MlaTensors tensors(const Inputs &in) {
    return {in[kQuery], in[kKvB], in[kCache], in[kSelected], {in[kBlockTable], in[kQueryStartLoc], in[kSeqLens]}};
  }
  Shape infer(const Inputs &in) const { return tensors(in).infer(attributes); }

  void run(const Inputs &in, void *out) const {
    const MlaInputs inputs = tensors(in).inputs(attributes, out);
    check_mla(inputs);
    mla_attention(inputs);
  }
};

struct MlaQkvAttentionOp {
  static constexpr const char *kName = "mla_qkv_attention";
  static constexpr int kTensors = 12;
  enum {
    kQuery, kKvA, kPositions, kCosSin, kNorm, kKvB, kCache, kSlots, kBlockTable, kQueryStartLoc, kSeqLens, kSelected
  };
  MlaAttributes attributes;
  int64_t kv_column;
  bool neox;
  float norm_eps, norm_offset;

  explicit MlaQkvAttentionOp(const Attributes &a)
      : attributes(a),
        kv_column(a.integer("kv_column")),
        neox(a.flag("neox")),
        norm_eps(a.number("norm_eps")),
        norm_offset(a.number("norm_offset")) {}

  static MlaTensors tensors(const Inputs &in) {
    return {in[kQuery], in[kKvB], in[kCache], in[kSelected], {in[kBlockTable], in[kQueryStartLoc], in[kSeqLens]}};
  }

  Shape infer(const Inputs &in) const {
    const Tensor &kv_a = in[kKvA];
    require_rank(kv_a, 2, "kv_a");
    require(kv_column >= 0 && (kv_a.dim(1) < 0 || kv_column + attributes.row() <= kv_a.dim(1)), "kv_column ", kv_column,
            " and ", attributes.row(), " columns of kv_a's ", kv_a.dim(1));
    for (int i : {kKvA, kPositions, kSlots}) {
      require_equal(in[i].dim(0), in[kQuery].dim(0), "kv_a, positions, slot_mapping and query: number of tokens");
    }
    require_rank(in[kPositions], 1, "positions");
    require_rank(in[kSlots], 1, "slot_mapping");
    if (in[kCosSin].given) {
      require(attributes.rope > 0 && attributes.rope % 2 == 0, "rope_dim ", attributes.rope,
              ", expected an even number");
      require_rank(in[kCosSin], 2, "cos_sin");
      require_equal(in[kCosSin].dim(1), attributes.rope, "cos_sin: width and rope_dim");
    }
    require_vector(in[kNorm], attributes.lora, "kv_norm");
    return tensors(in).infer(attributes);
  }

  HeadTransform rotation(const Inputs &in) const {
    HeadTransform t;
    t.head_size = attributes.rope;
    t.positions = in[kPositions].as<int64_t>();
    t.cos_sin = in[kCosSin].weight();
    t.rotary_dim = attributes.rope;
    t.neox = neox;
    return t;
  }

  HeadTransform norm(const Inputs &in) const {
    HeadTransform t;
    t.head_size = attributes.lora;
    t.norm = HeadNorm::head;
    t.norm_weight = in[kNorm].weight();
    t.norm_eps = norm_eps;
    t.norm_offset = norm_offset;
    return t;
  }

  void check(const Inputs &in, const MlaInputs &inputs) const {
    require_f32(in[kKvA], "kv_a");
    for (int i : {kCosSin, kNorm}) require_float(in[i], "cos_sin and kv_norm");
    check_mla(inputs);
    check_tokens(inputs.step, in[kSlots], in[kPositions], in[kCosSin]);
  }

  void run(const Inputs &in, void *out) const {
    MlaInputs inputs = tensors(in).inputs(attributes, out);
    check(in, inputs);
    const HeadTransform rotated = rotation(in), normed = norm(in);
    MlaWriteArgs write{};
    write.cache = inputs.step.cache.data;
    write.dtype = inputs.step.cache.dtype;
    write.num_slots = inputs.step.cache.num_slots;
    write.lora = attributes.lora;
    write.rope = attributes.rope;
    write.kv_c = in[kKvA].as<float>() + kv_column;
    write.k_pe = write.kv_c + attributes.lora;
    write.kv_c_stride = write.k_pe_stride = in[kKvA].dim(1);
    write.slot_mapping = in[kSlots].as<int64_t>();
    write.norm = in[kNorm].given ? &normed : nullptr;
    write.rotation = in[kCosSin].given ? &rotated : nullptr;
    write.end = inputs.step.num_tokens;
    mla_write(write);
    inputs.step.query_transform = write.rotation;
    mla_attention(inputs);
  }
};

struct ColumnsOp {
  static constexpr const char *kName = "columns";
  static constexpr int kTensors = 1;
  int64_t begin, end, parts;

  explicit ColumnsOp(const Attributes &a)
      : begin(a.integer("begin")), end(a.integer("end")), parts(a.integer("parts")) {
    require(begin >= 0 && begin < end && parts >= 1, "columns ", begin, " to ", end, " of ", parts, " parts");
  }

  Shape infer(const Inputs &in) const {
    const Tensor &x = in[0];
    require(x.rank > 0, "x: a scalar");
    const int64_t width = x.dim(-1);
    require(width < 0 || (width % parts == 0 && end <= width / parts), "columns ", begin, " to ", end, " of ", parts,
            " parts of ", width);
    Shape shape = x.shape();
    shape.back() = parts * (end - begin);
    return shape;
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const int64_t width = in[0].dim(-1) / parts, count = end - begin;
    const float *x = in[0].as<float>() + begin;
    parallel_for(in[0].rows() * parts, 1 + (1 << 14) / count, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        std::memcpy(static_cast<float *>(out) + row * count, x + row * width, count * sizeof(float));
      }
    });
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(MlaKvWrite, vllm_ms::aot::MlaKvWriteOp)
VLLM_MS_AOT_OPERATOR(MlaAttention, vllm_ms::aot::MlaAttentionOp)
VLLM_MS_AOT_OPERATOR(MlaQkvAttention, vllm_ms::aot::MlaQkvAttentionOp)
VLLM_MS_AOT_OPERATOR(Columns, vllm_ms::aot::ColumnsOp)

#include "../kernels/kv_cache.h"

#include "../aot.h"
#include "../attention_plan.h"

namespace vllm_ms {
namespace aot {
namespace {

struct KvWriteOp {
  static constexpr const char *kName = "kv_write";
  static constexpr int kTensors = 4;
  enum { kCache, kKey, kValue, kSlots };

  explicit KvWriteOp(const Attributes &) {}

  // The schema has no result; MindSpore wants one: [1] float32, zero.
  Shape infer(const Inputs &in) const {
    const Tensor &cache = in[kCache];
    require_rank(cache, 3, "kv_cache");
    require_rank(in[kSlots], 1, "slot_mapping");
    for (int i : {kKey, kValue}) {
      const char *name = i == kKey ? "key" : "value";
      require(in[i].rank == 2 || in[i].rank == 3, name, ": rank ", in[i].rank, ", expected 2 or 3");
      require_equal(in[i].dim(0), in[kSlots].dim(0), i == kKey ? "key and slot_mapping" : "value and slot_mapping");
    }
    const int64_t heads = cache.dim(1), row = cache.dim(2), key = width(in[kKey]), value = width(in[kValue]);
    const bool known = heads > 0 && row >= 0 && key >= 0 && value >= 0;
    require(!known || (key + value == heads * row && key % heads == 0), "key: ", key, " and value: ", value,
            " values a token, kv_cache has [", heads, ", ", row, "] a slot");
    return {1};
  }

  // Values a token, negative where unknown.
  static int64_t width(const Tensor &t) {
    int64_t width = 1;
    for (int d = 1; d < t.rank; ++d) width = t.dim(d) < 0 || width < 0 ? -1 : width * t.dim(d);
    return width;
  }

  void run(const Inputs &in, void *out) const {
    const Tensor &cache = in[kCache];
    require_f32(in[kKey], "key");
    require_f32(in[kValue], "value");
    require_float(cache, "kv_cache");
    require(in[kSlots].dtype == DType::i64, "slot_mapping: must be int64");
    const int64_t tokens = in[kSlots].dim(0), heads = cache.dim(1);
    KvWriteArgs args{};
    args.key = in[kKey].as<float>();
    args.key_stride = width(in[kKey]);
    args.value = in[kValue].as<float>();
    args.value_stride = width(in[kValue]);
    args.cache = {cache.data, cache.dtype, cache.dim(0), heads, args.key_stride / heads, args.value_stride / heads};
    args.slot_mapping = in[kSlots].as<int64_t>();
    args.end = tokens;
    kv_write(args);
    *static_cast<float *>(out) = 0;
    check_slots(args.slot_mapping, tokens, args.cache.num_slots);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(KvWrite, vllm_ms::aot::KvWriteOp)

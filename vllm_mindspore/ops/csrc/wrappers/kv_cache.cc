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
      const Tensor &t = in[i];
      const char *name = i == kKey ? "key" : "value";
      require(t.rank == 2 || t.rank == 3, name, ": rank ", t.rank, ", expected 2 or 3");
      require_equal(t.dim(0), in[kSlots].dim(0), i == kKey ? "key and slot_mapping" : "value and slot_mapping");
      bool known = cache.dim(1) >= 0 && cache.dim(2) >= 0;
      int64_t width = 1;
      for (int d = 1; d < t.rank; ++d) {
        known = known && t.dim(d) >= 0;
        width *= t.dim(d);
      }
      require(!known || 2 * width == cache.dim(1) * cache.dim(2), name, ": ", width, " values a token, kv_cache has [",
              cache.dim(1), ", ", cache.dim(2), "] a slot");
    }
    return {1};
  }

  void run(const Inputs &in, void *out) const {
    const Tensor &cache = in[kCache];
    require_f32(in[kKey], "key");
    require_f32(in[kValue], "value");
    require_float(cache, "kv_cache");
    require(in[kSlots].dtype == DType::i64, "slot_mapping: must be int64");
    const int64_t tokens = in[kSlots].dim(0), width = cache.dim(1) * cache.dim(2) / 2;
    KvWriteArgs args{};
    args.cache = {cache.data, cache.dtype, cache.dim(0), cache.dim(1), cache.dim(2) / 2};
    args.key = in[kKey].as<float>();
    args.key_stride = width;
    args.value = in[kValue].as<float>();
    args.value_stride = width;
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

#include "../kernels/embedding.h"

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

// Shared by both: ids, and the table or the rows of it from `first` on.
struct RowsOf {
  static constexpr int kTensors = 2;
  int64_t first;
  explicit RowsOf(int64_t first) : first(first) {}
  Shape infer(const Inputs &in) const {
    require_rank(in[1], 2, "weight");
    Shape out = in[0].shape();
    out.push_back(in[1].dim(1));
    return out;
  }
  void run(const Inputs &in, void *out) const {
    require(in[0].dtype == DType::i32 || in[0].dtype == DType::i64, "ids: must be int32 or int64");
    require_matrix_weight(in[1], "weight");
    embedding({in[0].data, in[0].dtype, in[1].weight(), static_cast<float *>(out), in[0].numel(), in[1].dim(0),
               in[1].dim(1), first});
  }
};

struct EmbeddingOp : RowsOf {
  static constexpr const char *kName = "embedding";
  explicit EmbeddingOp(const Attributes &) : RowsOf(0) {}
};

struct EmbeddingShardOp : RowsOf {
  static constexpr const char *kName = "embedding_shard";
  explicit EmbeddingShardOp(const Attributes &a) : RowsOf(a.integer("first")) {}
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(Embedding, vllm_ms::aot::EmbeddingOp)
VLLM_MS_AOT_OPERATOR(EmbeddingShard, vllm_ms::aot::EmbeddingShardOp)

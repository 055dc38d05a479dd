// Collectives that are begun by one operator and ended by another, and those between two ranks; see begun.h.
#include "../begun.h"

#include "named_group.h"
#include "round.h"

namespace vllm_ms {
namespace aot {
namespace {

// Shared by all: the group, and how values go.
struct Begun : NamedGroup {
  DType wire;
  explicit Begun(const Attributes &a) : NamedGroup(a) {
    const std::string text = a.text("wire");
    require(text == "float32" || text == "bfloat16", "wire ", text, ": expected float32 or bfloat16");
    wire = text == "bfloat16" ? DType::bf16 : DType::f32;
  }
};

struct AllReduceStartOp : Begun {
  static constexpr const char *kName = "all_reduce_start";
  static constexpr int kTensors = 1;
  using Begun::Begun;
  Shape infer(const Inputs &) const { return {1}; }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    write_round(begin_all_reduce(joined(), wire, in[0].as<float>(), in[0].numel()), out);
  }
};

struct AllReduceWaitOp : Begun {
  static constexpr const char *kName = "all_reduce_wait";
  static constexpr int kTensors = 2;
  enum { kBegun, kX };
  using Begun::Begun;
  Shape infer(const Inputs &in) const { return in[kX].shape(); }
  void run(const Inputs &in, void *out) const {
    const Tensor &x = in[kX];
    end_all_reduce(joined(), round_of(in[kBegun]), wire, x.as<float>(), x.numel(), static_cast<float *>(out));
  }
};

struct AlongDim : Begun, PartsAlong {
  explicit AlongDim(const Attributes &a) : Begun(a), PartsAlong(a) {}
};

struct AllGatherStartOp : AlongDim {
  static constexpr const char *kName = "all_gather_start";
  static constexpr int kTensors = 1;
  using AlongDim::AlongDim;
  Shape infer(const Inputs &in) const {
    gathered(in[0]);
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides whole = sides(in[0]);
    write_round(begin_all_gather(joined(size), wire, in[0].as<float>(), whole.outer, whole.inner), out);
  }
};

struct AllGatherWaitOp : AlongDim {
  static constexpr const char *kName = "all_gather_wait";
  static constexpr int kTensors = 2;
  enum { kBegun, kX };
  using AlongDim::AlongDim;
  Shape infer(const Inputs &in) const { return gathered(in[kX]); }
  void run(const Inputs &in, void *out) const {
    const Tensor &x = in[kX];
    const Sides whole = sides(x);
    end_all_gather(joined(size), round_of(in[kBegun]), wire, x.as<float>(), whole.outer, whole.inner,
                   static_cast<float *>(out));
  }
};

struct ReduceScatterStartOp : AlongDim {
  static constexpr const char *kName = "reduce_scatter_start";
  static constexpr int kTensors = 1;
  using AlongDim::AlongDim;
  Shape infer(const Inputs &in) const {
    scattered(in[0]);
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides whole = sides(in[0]);
    write_round(begin_reduce_scatter(joined(size), wire, in[0].as<float>(), whole.outer, whole.inner / size), out);
  }
};

struct ReduceScatterWaitOp : AlongDim {
  static constexpr const char *kName = "reduce_scatter_wait";
  static constexpr int kTensors = 2;
  enum { kBegun, kX };
  using AlongDim::AlongDim;
  Shape infer(const Inputs &in) const { return scattered(in[kX]); }
  void run(const Inputs &in, void *out) const {
    const Tensor &x = in[kX];
    const Sides whole = sides(x);
    end_reduce_scatter(joined(size), round_of(in[kBegun]), wire, x.as<float>(), whole.outer, whole.inner / size,
                       static_cast<float *>(out));
  }
};

// Of rows, of which ranks have unlike numbers.
struct OfRows : Begun {
  int64_t rank, size;
  explicit OfRows(const Attributes &a) : Begun(a), rank(a.integer("rank")), size(a.integer("size")) {}

  StepTokens tokens_of(const Tensor &token_ranks, const Tensor &x) const {
    require(token_ranks.dtype == DType::i32, "token_ranks: must be int32");
    require_equal(x.dim(0), token_ranks.numel(), "rows of x and tokens of all ranks");
    return StepTokens(token_ranks.as<int32_t>(), token_ranks.numel(), static_cast<int>(size));
  }
  RowCounts counts_of(const Tensor &counts, const Tensor &x) const {
    require(counts.dtype == DType::i32, "counts: must be int32");
    require_rank(counts, 2, "counts");
    require(counts.dim(0) == size && counts.dim(1) == size, "counts: expected ", size, " ranks each way");
    const RowCounts found(counts.as<int32_t>(), static_cast<int>(size));
    require_equal(x.dim(0), found.sent_by(static_cast<int>(rank)), "rows of x and counts of this rank");
    return found;
  }
};

struct ReduceScatterRowsStartOp : OfRows {
  static constexpr const char *kName = "reduce_scatter_rows_start";
  static constexpr int kTensors = 2;
  enum { kX, kTokenRanks };
  using OfRows::OfRows;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    require_rank(in[kTokenRanks], 1, "token_ranks");
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[kX], "x");
    const StepTokens tokens = tokens_of(in[kTokenRanks], in[kX]);
    write_round(begin_reduce_scatter_rows(joined(rank, size), wire, tokens, in[kX].as<float>(), in[kX].dim(1)), out);
  }
};

struct ReduceScatterRowsWaitOp : OfRows {
  static constexpr const char *kName = "reduce_scatter_rows_wait";
  static constexpr int kTensors = 4;
  enum { kBegun, kX, kTokenRanks, kOwn };
  using OfRows::OfRows;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    return {in[kOwn].dim(0), in[kX].dim(1)};
  }
  void run(const Inputs &in, void *out) const {
    const StepTokens tokens = tokens_of(in[kTokenRanks], in[kX]);
    require_equal(tokens.count[rank], in[kOwn].dim(0), "tokens of this rank, by token_ranks and by rows");
    end_reduce_scatter_rows(joined(rank, size), round_of(in[kBegun]), wire, tokens, in[kX].as<float>(), in[kX].dim(1),
                            static_cast<float *>(out));
  }
};

struct AllToAllStartOp : OfRows {
  static constexpr const char *kName = "all_to_all_start";
  static constexpr int kTensors = 2;
  enum { kX, kCounts };
  using OfRows::OfRows;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[kX], "x");
    const RowCounts counts = counts_of(in[kCounts], in[kX]);
    write_round(begin_all_to_all(joined(rank, size), wire, counts, in[kX].as<float>(), in[kX].dim(1)), out);
  }
};

struct AllToAllWaitOp : OfRows {
  static constexpr const char *kName = "all_to_all_wait";
  static constexpr int kTensors = 4;
  enum { kBegun, kX, kCounts, kOwn };
  using OfRows::OfRows;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    return {in[kOwn].dim(0), in[kX].dim(1)};
  }
  void run(const Inputs &in, void *out) const {
    const RowCounts counts = counts_of(in[kCounts], in[kX]);
    require_equal(counts.sent_to(static_cast<int>(rank)), in[kOwn].dim(0), "rows for this rank, by counts and by rows");
    end_all_to_all(joined(rank, size), round_of(in[kBegun]), wire, counts, in[kX].as<float>(), in[kX].dim(1),
                   static_cast<float *>(out));
  }
};

struct SendOp : Begun {
  static constexpr const char *kName = "send";
  static constexpr int kTensors = 1;
  using Begun::Begun;
  Shape infer(const Inputs &) const { return {1}; }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    send(joined(), wire, in[0].as<float>(), in[0].numel());
    *static_cast<float *>(out) = 0.0f;
  }
};

struct ReceiveOp : Begun {
  static constexpr const char *kName = "receive";
  static constexpr int kTensors = 1;
  int64_t width;
  explicit ReceiveOp(const Attributes &a) : Begun(a), width(a.integer("width")) {}
  Shape infer(const Inputs &in) const { return {in[0].dim(0), width}; }
  void run(const Inputs &in, void *out) const {
    receive(joined(), wire, in[0].dim(0) * width, static_cast<float *>(out));
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(AllReduceStart, vllm_ms::aot::AllReduceStartOp)
VLLM_MS_AOT_OPERATOR(AllReduceWait, vllm_ms::aot::AllReduceWaitOp)
VLLM_MS_AOT_OPERATOR(AllGatherStart, vllm_ms::aot::AllGatherStartOp)
VLLM_MS_AOT_OPERATOR(AllGatherWait, vllm_ms::aot::AllGatherWaitOp)
VLLM_MS_AOT_OPERATOR(ReduceScatterStart, vllm_ms::aot::ReduceScatterStartOp)
VLLM_MS_AOT_OPERATOR(ReduceScatterWait, vllm_ms::aot::ReduceScatterWaitOp)
VLLM_MS_AOT_OPERATOR(ReduceScatterRowsStart, vllm_ms::aot::ReduceScatterRowsStartOp)
VLLM_MS_AOT_OPERATOR(ReduceScatterRowsWait, vllm_ms::aot::ReduceScatterRowsWaitOp)
VLLM_MS_AOT_OPERATOR(AllToAllStart, vllm_ms::aot::AllToAllStartOp)
VLLM_MS_AOT_OPERATOR(AllToAllWait, vllm_ms::aot::AllToAllWaitOp)
VLLM_MS_AOT_OPERATOR(Send, vllm_ms::aot::SendOp)
VLLM_MS_AOT_OPERATOR(Receive, vllm_ms::aot::ReceiveOp)

// Each exchange is two operators: one begins it, and its result stands for the round that the other one ends.
#include "../exchange.h"

#include "named_group.h"
#include "round.h"

namespace vllm_ms {
namespace aot {
namespace {

// Shared by all: the group by its name, and the step's tokens.
struct Exchange : NamedGroup {
  int64_t rank, size;
  explicit Exchange(const Attributes &a) : NamedGroup(a), rank(a.integer("rank")), size(a.integer("size")) {}

  Group &joined() const { return NamedGroup::joined(rank, size); }

  StepTokens tokens_of(const Tensor &token_ranks, const Group &group) const {
    require(token_ranks.dtype == DType::i32, "token_ranks: must be int32");
    return StepTokens(token_ranks.as<int32_t>(), token_ranks.numel(), group.size());
  }
  // Of a rank that has the rows `own`.
  StepTokens tokens_of(const Tensor &token_ranks, const Group &group, const Tensor &own) const {
    const StepTokens tokens = tokens_of(token_ranks, group);
    require_equal(tokens.count[group.rank()], own.dim(0), "tokens of this rank, by token_ranks and by rows");
    return tokens;
  }
};

struct BetweenHolders : Exchange {
  ExpertHolders holders;
  explicit BetweenHolders(const Attributes &a)
      : Exchange(a), holders{a.integer("capacity"), a.integer("columns"), a.integer("column")} {
    require(holders.capacity >= 0 && holders.columns >= 1 && holders.column >= 0 && holders.column < holders.columns,
            "capacity ", holders.capacity, ", column ", holders.column, " of ", holders.columns);
  }
};

// Begins to send rows of a rank's tokens, [count of this rank, width].
template <uint32_t (*begin)(Group &, const StepTokens &, const float *, int64_t)>
struct RowsStart : Exchange {
  static constexpr int kTensors = 2;
  using Exchange::Exchange;
  Shape infer(const Inputs &in) const {
    require_rank(in[0], 2, "x");
    require_rank(in[1], 1, "token_ranks");
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    Group &group = joined();
    const StepTokens tokens = tokens_of(in[1], group, in[0]);
    write_round(begin(group, tokens, in[0].as<float>(), in[0].dim(1)), out);
  }
};

struct GatherRowsStartOp : RowsStart<begin_gather_rows> {
  static constexpr const char *kName = "gather_rows_start";
  using RowsStart::RowsStart;
};

struct MoeDispatchStartOp : RowsStart<begin_dispatch> {
  static constexpr const char *kName = "moe_dispatch_start";
  using RowsStart::RowsStart;
};

struct GatherRowsWaitOp : Exchange {
  static constexpr const char *kName = "gather_rows_wait";
  static constexpr int kTensors = 3;
  enum { kBegun, kX, kTokenRanks };
  using Exchange::Exchange;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    require_rank(in[kTokenRanks], 1, "token_ranks");
    return {in[kTokenRanks].dim(0), in[kX].dim(1)};
  }
  void run(const Inputs &in, void *out) const {
    Group &group = joined();
    const StepTokens tokens = tokens_of(in[kTokenRanks], group, in[kX]);
    end_gather_rows(group, round_of(in[kBegun]), tokens, in[kX].as<float>(), in[kX].dim(1), static_cast<float *>(out));
  }
};

struct MoeDispatchWaitOp : BetweenHolders {
  static constexpr const char *kName = "moe_dispatch_wait";
  static constexpr int kTensors = 4;
  enum { kBegun, kX, kRouting, kTokenRanks };
  using BetweenHolders::BetweenHolders;
  Shape infer(const Inputs &in) const {
    require_rank(in[kX], 2, "x");
    require_rank(in[kRouting], 2, "routing");
    require_equal(in[kRouting].dim(0), in[kTokenRanks].dim(0), "rows of routing and tokens of all ranks");
    return {in[kTokenRanks].dim(0), in[kX].dim(1)};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[kRouting], "routing");
    Group &group = joined();
    const StepTokens tokens = tokens_of(in[kTokenRanks], group, in[kX]);
    end_dispatch(group, round_of(in[kBegun]), tokens, holders, in[kRouting].as<float>(), in[kRouting].dim(1) / 2,
                 in[kX].as<float>(), in[kX].dim(1), static_cast<float *>(out));
  }
};

struct MoeCombineStartOp : BetweenHolders {
  static constexpr const char *kName = "moe_combine_start";
  static constexpr int kTensors = 3;
  enum { kY, kRouting, kTokenRanks };
  using BetweenHolders::BetweenHolders;
  Shape infer(const Inputs &in) const {
    require_rank(in[kY], 2, "y");
    require_rank(in[kRouting], 2, "routing");
    require_equal(in[kY].dim(0), in[kTokenRanks].dim(0), "rows of y and tokens of all ranks");
    require_equal(in[kRouting].dim(0), in[kTokenRanks].dim(0), "rows of routing and tokens of all ranks");
    return {1};
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[kY], "y");
    require_f32(in[kRouting], "routing");
    Group &group = joined();
    const StepTokens tokens = tokens_of(in[kTokenRanks], group);
    write_round(begin_combine(group, tokens, holders, in[kRouting].as<float>(), in[kRouting].dim(1) / 2,
                              in[kY].as<float>(), in[kY].dim(1)),
                out);
  }
};

struct MoeCombineWaitOp : BetweenHolders {
  static constexpr const char *kName = "moe_combine_wait";
  static constexpr int kTensors = 5;
  enum { kBegun, kY, kRouting, kTokenRanks, kOwn };
  using BetweenHolders::BetweenHolders;
  Shape infer(const Inputs &in) const {
    require_rank(in[kY], 2, "y");
    require_rank(in[kOwn], 2, "own");
    return {in[kOwn].dim(0), in[kY].dim(1)};
  }
  void run(const Inputs &in, void *out) const {
    Group &group = joined();
    const StepTokens tokens = tokens_of(in[kTokenRanks], group, in[kOwn]);
    end_combine(group, round_of(in[kBegun]), tokens, holders, in[kRouting].as<float>(), in[kRouting].dim(1) / 2,
                in[kY].as<float>(), in[kY].dim(1), static_cast<float *>(out));
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(GatherRowsStart, vllm_ms::aot::GatherRowsStartOp)
VLLM_MS_AOT_OPERATOR(GatherRowsWait, vllm_ms::aot::GatherRowsWaitOp)
VLLM_MS_AOT_OPERATOR(MoeDispatchStart, vllm_ms::aot::MoeDispatchStartOp)
VLLM_MS_AOT_OPERATOR(MoeDispatchWait, vllm_ms::aot::MoeDispatchWaitOp)
VLLM_MS_AOT_OPERATOR(MoeCombineStart, vllm_ms::aot::MoeCombineStartOp)
VLLM_MS_AOT_OPERATOR(MoeCombineWait, vllm_ms::aot::MoeCombineWaitOp)

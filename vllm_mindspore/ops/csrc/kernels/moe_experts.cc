#include "moe_experts.h"

#include "../moe_plan.h"
#include "../parallel.h"
#include "column_product.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kPackedBytes = 1 << 20;    // of one job's activations, to stay in the second-level cache
constexpr int64_t kHiddenBytes = 96 << 20;   // of what passes from the first to the second product
constexpr int64_t kLeastTokens = 768;  // at once, whatever their bytes
constexpr int64_t kPiecesPerThread = 8;

// One of the two products: the same linear layer of every expert.
template <class T>
struct ExpertLayer {
  const T *weight;
  int64_t rows, k;       // of an expert's weight
  int64_t width;         // columns of its result
  int64_t block;         // columns of a block
  bool gated, interleaved;

  int64_t blocks() const { return (width + block - 1) / block; }
  int64_t count(int64_t at) const { return min64(block, width - at * block); }
  // The weight row of a column, half 0 the gate's.
  int64_t row(int64_t column, int half) const { return interleaved ? 2 * column + half : half * width + column; }
  const T *rows_of(int64_t expert, int64_t column, int half) const {
    return weight + (expert * rows + row(column, half)) * k;
  }
};

// Part of the work on a layer: from `begin` to `end` in the order of jobs and then blocks, of blocks [low, high).
struct Range {
  MoePlace begin, end;
  int64_t low, high;

  bool has(const MoePlace &at) const {
    return at.job < end.job || (at.job == end.job && at.block < end.block);
  }
  MoePlace after(const MoePlace &at) const {
    return at.block + 1 < high ? MoePlace{at.job, at.block + 1} : MoePlace{at.job + 1, low};
  }
};

// The packed activations of all slots: slot i has row i, or row index[i] where there is an index.
template <class X>
struct SlotRows {
  const X *data;
  int64_t stride;
  const int32_t *index;

  // A job's rows, one after the other: where they are, or copied to `gathered`.
  PackedRows<X> of(const MoeJob &job, X *gathered) const {
    if (index == nullptr) return {data + job.first_slot * stride, stride, job.tokens};
    for (int64_t t = 0; t < job.tokens; ++t) {
      std::memcpy(gathered + t * stride, data + index[job.first_slot + t] * stride, stride * sizeof(X));
    }
    return {gathered, stride, job.tokens};
  }
  int64_t gathered_bytes(int64_t tokens) const { return index == nullptr ? 0 : tokens * stride * sizeof(X); }
};

// Calls finish(job, column, count, sums) for every block of the range, sums[t * kBlock + i] the products of the job's
// t-th token with the i-th column, those of a gate from 0 and of up from kUp on.
template <class T, class X, class Finish>
VLLM_MS_INLINE void multiply_range(const ExpertLayer<T> &layer, const MoePlan &plan, const SlotRows<X> &x,
                                   const Range &range, Finish finish) {
  const Scratch sums_buffer(plan.max_tokens() * kBlock * sizeof(float));
  const Scratch gathered(x.gathered_bytes(plan.max_tokens()));
  PackedRows<X> rows{};
  int64_t rows_job = -1;
  float *sums = sums_buffer.as<float>();
  for (MoePlace at = range.begin; range.has(at);) {
    const MoePlace after = range.after(at);
    const MoeJob &job = plan.job(at.job);
    const int64_t column = at.block * layer.block, count = layer.count(at.block);
    const T *weight = layer.rows_of(job.expert, column, 0);
    const int64_t next =
        range.has(after) ? layer.rows_of(plan.job(after.job).expert, after.block * layer.block, 0) - weight : 0;
    const BlockRows<T> in_order = rows_in_order(weight, count, layer.k, next);
    const BlockRows<T> of_both{
        {weight, layer.rows_of(job.expert, column, 1)}, {count, count}, layer.interleaved ? 2 : 1, layer.k, next};
    if (at.job != rows_job) rows = x.of(job, gathered.as<X>());
    rows_job = at.job;
    multiply_block(layer.gated ? of_both : in_order, rows, sums);
    finish(job, column, count, sums);
    at = after;
  }
}

VLLM_MS_INLINE float value_at(const Weight &weight, int64_t i) {
  float value = 0.0f;
  VLLM_MS_DISPATCH_FLOAT(weight.dtype, B, { value = to_float(static_cast<const B *>(weight.data)[i]); });
  return value;
}

// Activation of the first product's sums.
template <Activation::Kind kind>
VLLM_MS_INLINE Vec activate_sums(const MoeExpertsArgs &args, Vec gate, Vec up) {
  if (args.clamped) {
    gate = vmin(gate, set1(args.limit));
    up = vmin(vmax(up, set1(-args.limit)), set1(args.limit));
    return gate * vsigmoid(gate * args.alpha) * (up + args.beta);
  }
  const Vec v = activate<kind>(gate);
  return args.activation.gated ? v * up : v;
}

// Bias and activation of columns [column, column + count) of a job's tokens, written to their slots of `hidden`.
template <class T, class X>
VLLM_MS_INLINE void finish_hidden(const MoeExpertsArgs &args, const ExpertLayer<T> &layer, const MoeJob &job,
                                  int64_t column, int64_t count, const float *sums, int64_t stride, X *hidden) {
  alignas(64) float bias[kBlock] = {};
  if (args.w13_bias) {
    for (int64_t i = 0; i < count; ++i) {
      bias[i] = value_at(args.w13_bias, job.expert * layer.rows + layer.row(column + i, 0));
      if (layer.gated) bias[kUp + i] = value_at(args.w13_bias, job.expert * layer.rows + layer.row(column + i, 1));
    }
  }
  const bool last = column + count == layer.width;
  with_activation(args.activation.kind, [&](auto tag) {
    for (int64_t t = 0; t < job.tokens; ++t) {
      const float *sum = sums + t * kBlock;
      X *out = hidden + (job.first_slot + t) * stride;
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vec up = layer.gated ? load(sum + kUp + i) + load(bias + kUp + i) : zero();
        const Vec v = activate_sums<decltype(tag)::value>(args, load(sum + i) + load(bias + i), up);
        store_part(out + column + i, v, min64(kLanes, count - i));
      }
      if (last) std::memset(out + layer.width, 0, (stride - layer.width) * sizeof(X));
    }
  });
}

// Adds a job's results, weighted, to columns [column, column + count) of its tokens' rows.
VLLM_MS_INLINE void add_results(const MoeExpertsArgs &args, const MoePlan &plan, const MoeJob &job, int64_t column,
                                int64_t count, const float *sums, float *out) {
  alignas(64) float bias[kBlock] = {};
  for (int64_t i = 0; args.w2_bias && i < count; ++i) {
    bias[i] = value_at(args.w2_bias, job.expert * args.width + column + i);
  }
  for (int64_t t = 0; t < job.tokens; ++t) {
    const int64_t slot = job.first_slot + t;
    const Vec weight = set1(args.weight_on_input ? 1.0f : plan.weight_of_slot()[slot]);
    float *row = out + plan.token_of_slot()[slot] * args.width + column;
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec v = load(sums + t * kBlock + i) + load(bias + i);
      const int64_t n = min64(kLanes, count - i);
      store_part(row + i, fma(weight, v, load_part(row + i, n)), n);
    }
  }
}

// Gate and up, or the first layer of experts without a gate: hidden [slots, stride].
template <class T, class X>
void first_product(const MoeExpertsArgs &args, const MoePlan &plan, const SlotRows<X> &x, int64_t stride, X *hidden) {
  const bool gated = args.activation.gated;
  const ExpertLayer<T> layer{static_cast<const T *>(args.w13.data), gated ? 2 * args.inter : args.inter, args.hidden,
                             args.inter, gated ? kUp : kBlock, gated, args.interleaved};
  const int64_t blocks = layer.blocks(), pieces = plan.pieces(blocks);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    const Range range{plan.begin_of(begin, pieces, blocks), plan.begin_of(end, pieces, blocks), 0, blocks};
    multiply_range(layer, plan, x, range, [&](const MoeJob &job, int64_t column, int64_t count, const float *sums) {
      finish_hidden(args, layer, job, column, count, sums, stride, hidden);
    });
  });
}

// Down: each thread adds up its columns of all tokens, expert by expert.
template <class T, class X>
void second_product(const MoeExpertsArgs &args, const MoePlan &plan, const SlotRows<X> &hidden, int64_t first,
                    int64_t tokens) {
  ExpertLayer<T> layer{static_cast<const T *>(args.w2.data), args.width, args.inter, args.width, kBlock, false, false};
  constexpr int64_t kNarrowest = kInColumns<T> ? kColumnGroup : kTileRows;
  while (layer.block > kNarrowest && layer.blocks() < kPiecesPerThread * num_threads()) layer.block /= 2;
  float *out = args.out + first * args.width;
  parallel_for(layer.blocks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * layer.block, columns = min64(end * layer.block, args.width) - from;
    for (int64_t t = 0; t < tokens; ++t) {
      float *row = out + t * args.width + from;
      if (args.residual != nullptr) {
        std::memcpy(row, args.residual + (first + t) * args.width + from, columns * sizeof(float));
      } else {
        std::memset(row, 0, columns * sizeof(float));
      }
    }
    const Range range{{0, begin}, {plan.num_jobs(), begin}, begin, end};
    multiply_range(layer, plan, hidden, range, [&](const MoeJob &job, int64_t column, int64_t count, const float *sums) {
      add_results(args, plan, job, column, count, sums, out);
    });
  });
}

template <class T>
void run(const MoeExpertsArgs &args) {
  using X = typename Packed<T>::Type;
  const int64_t stride = packed_stride<X>(args.hidden), hidden_stride = packed_stride<X>(args.inter);
  const int64_t job_tokens = tokens_within(kPackedBytes, stride * sizeof(X));
  const int64_t at_once = max64(kLeastTokens, kHiddenBytes / max64(1, args.top_k * hidden_stride * sizeof(X)));
  for (int64_t first = 0; first < args.tokens; first += at_once) {
    const int64_t tokens = min64(at_once, args.tokens - first);
    const float *routing = args.routing + first * 2 * args.top_k;
    const MoePlan plan(routing, tokens, args.top_k, args.experts, job_tokens);
    const Scratch packed(tokens * stride * sizeof(X)), hidden(plan.num_slots() * hidden_stride * sizeof(X));
    const NormArgs norm{args.x + first * args.hidden, nullptr,   tokens,   args.hidden,     args.norm_weight,
                        args.norm_bias,               args.norm, args.eps, args.norm_offset};
    pack_rows(norm, stride, packed.as<X>(), [&](int64_t t) {
      return args.weight_on_input ? routing[t * 2 * args.top_k + args.top_k] : 1.0f;
    });
    const SlotRows<X> x{packed.as<X>(), stride, plan.token_of_slot()};
    first_product<T>(args, plan, x, hidden_stride, hidden.as<X>());
    const SlotRows<X> rows{hidden.as<X>(), hidden_stride, nullptr};
    second_product<T>(args, plan, rows, first, tokens);
  }
}

}  // namespace

void moe_experts(const MoeExpertsArgs &args) {
  if (args.tokens == 0 || args.width == 0) return;
#if defined(VLLM_MS_COLUMNS)
  if (args.w13.dtype == DType::bf16_columns) return run<bf16_columns>(args);
  if (args.w13.dtype == DType::bf16_coded) return run<bf16_coded>(args);
#endif
  VLLM_MS_DISPATCH_FLOAT(args.w13.dtype, T, { run<T>(args); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#include "moe_experts.h"

#include "../moe_plan.h"
#include "../parallel.h"
#include "tile_product.h"

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
  int64_t step() const { return interleaved ? 2 : 1; }
  // The weight row of a column, half 0 the gate's.
  int64_t row(int64_t column, int half) const { return interleaved ? 2 * column + half : half * width + column; }
};

// Part of the work on a layer: from `begin` to `end` in the order of jobs and then blocks, of blocks [low, high).
struct Range {
  MoePlace begin, end;
  int64_t low, high;
};

// Goes through the tiles of a range.
struct TileCursor {
  MoePlace at;
  int half;
  int64_t row;  // in the block

  template <class T>
  TileCursor next(const ExpertLayer<T> &layer, const Range &range) const {
    if (row + kTileRows < layer.count(at.block)) return {at, half, row + kTileRows};
    if (layer.gated && half == 0) return {at, 1, 0};
    if (at.block + 1 < range.high) return {{at.job, at.block + 1}, 0, 0};
    return {{at.job + 1, range.low}, 0, 0};
  }
  bool within(const Range &range) const {
    return at.job < range.end.job || (at.job == range.end.job && at.block < range.end.block);
  }
  template <class T>
  const T *weight(const ExpertLayer<T> &layer, const MoePlan &plan) const {
    const int64_t first = layer.row(at.block * layer.block + row, half);
    return layer.weight + (plan.job(at.job).expert * layer.rows + first) * layer.k;
  }
};

// Calls finish(job, column, count, sums) for every block of the range, sums[t * kBlock + i] the products of the job's
// t-th token with the i-th column, those of a gate from 0 and of up from kUp on.
template <class T, class X, class Finish>
VLLM_MS_INLINE void multiply_range(const ExpertLayer<T> &layer, const MoePlan &plan, const PackedRows<X> &x,
                                   const Range &range, Finish finish) {
  const Scratch sums_buffer(plan.max_tokens() * kBlock * sizeof(float));
  const Scratch partial_buffer(plan.max_tokens() * kTileRows * sizeof(Vec));
  float *sums = sums_buffer.as<float>();
  TileCursor cursor{range.begin, 0, 0};
  while (cursor.within(range)) {
    const TileCursor next = cursor.next(layer, range);
    const MoeJob &job = plan.job(cursor.at.job);
    const int64_t count = layer.count(cursor.at.block);
    const T *weight = cursor.weight(layer, plan);
    const WeightTile<T> tile(weight, next.within(range) ? next.weight(layer, plan) : weight, layer.step(),
                          min64(kTileRows, count - cursor.row), layer.k);
    multiply_tile(tile, x.from(job.first_slot, job.tokens), partial_buffer.as<float>(),
                  sums + cursor.half * kUp + cursor.row);
    if (next.at.job != cursor.at.job || next.at.block != cursor.at.block) {
      finish(job, cursor.at.block * layer.block, count, sums);
    }
    cursor = next;
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
void first_product(const MoeExpertsArgs &args, const MoePlan &plan, const PackedRows<X> &x, int64_t stride, X *hidden) {
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
void second_product(const MoeExpertsArgs &args, const MoePlan &plan, const PackedRows<X> &hidden, int64_t first,
                    int64_t tokens) {
  ExpertLayer<T> layer{static_cast<const T *>(args.w2.data), args.width, args.inter, args.width, kBlock, false, false};
  while (layer.block > kTileRows && layer.blocks() < kPiecesPerThread * num_threads()) layer.block /= 2;
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
  const int64_t stride = round_up(args.hidden, Packed<T>::kStep), hidden_stride = round_up(args.inter, Packed<T>::kStep);
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
    const PackedRows<X> x{packed.as<X>(), stride, plan.num_slots(), plan.token_of_slot()};
    first_product<T>(args, plan, x, hidden_stride, hidden.as<X>());
    const PackedRows<X> rows{hidden.as<X>(), hidden_stride, plan.num_slots(), nullptr};
    second_product<T>(args, plan, rows, first, tokens);
  }
}

}  // namespace

void moe_experts(const MoeExpertsArgs &args) {
  if (args.tokens == 0 || args.width == 0) return;
  VLLM_MS_DISPATCH_FLOAT(args.w13.dtype, T, { run<T>(args); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

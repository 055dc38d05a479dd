#include "moe_route.h"

#include <cfloat>

#include "../parallel.h"
#include "../vec_math.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr float kTaken = -__builtin_inff();  // below every candidate
constexpr float kSmallestSum = 1e-20f;

VLLM_MS_INLINE int64_t padded_size(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The scores of one row; those up to a whole vector become 0.
void score(const MoeRouteArgs &args, const float *logits, int64_t padded, float *scores) {
  std::memset(scores + padded - kLanes, 0, kLanes * sizeof(float));
  if (args.scoring == Scoring::sigmoid) {
    for (int64_t i = 0; i < args.experts; i += kLanes) {
      const int64_t n = args.experts - i < kLanes ? args.experts - i : kLanes;
      store_part(scores + i, vsigmoid(load_part(logits + i, n)), n);
    }
    return;
  }
  float best = -FLT_MAX;
  for (int64_t i = 0; i < args.experts; ++i) best = logits[i] > best ? logits[i] : best;
  Vec sum = zero();
  for (int64_t i = 0; i < args.experts; i += kLanes) {
    const int64_t n = args.experts - i < kLanes ? args.experts - i : kLanes;
    store_part(scores + i, vexp(load_part(logits + i, n) - best), n);
    sum += load(scores + i);
  }
  const float scale = 1.0f / hsum(sum);
  for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) * scale);
}

// Index of the largest of `count` values, the first of equal ones, and marks it as taken; whole vectors are readable and
// end in taken ones.
int64_t take_best(float *values, int64_t count) {
  Vec best = load(values);
  for (int64_t i = kLanes; i < count; i += kLanes) best = vmax(best, load(values + i));
  const float largest = hmax(best);
  int64_t index = 0;
  while (index + 1 < count && values[index] != largest) ++index;
  values[index] = kTaken;
  return index;
}

// The worth of a group of experts to the choice of groups.
float group_worth(const float *candidates, int64_t size, bool two_best) {
  float best = kTaken, second = kTaken;
  for (int64_t i = 0; i < size; ++i) {
    second = candidates[i] > best ? best : (candidates[i] > second ? candidates[i] : second);
    best = candidates[i] > best ? candidates[i] : best;
  }
  const float worth = two_best && size > 1 ? best + second : best;
  return worth > -FLT_MAX ? worth : -FLT_MAX;
}

// Marks the experts outside of the best groups as taken. worth: temporary memory for a value per group.
void keep_best_groups(const MoeRouteArgs &args, float *candidates, float *worth) {
  const int64_t size = args.experts / args.groups;
  store(worth + padded_size(args.groups) - kLanes, set1(kTaken));
  for (int64_t g = 0; g < args.groups; ++g) {
    worth[g] = group_worth(candidates + g * size, size, static_cast<bool>(args.bias));
  }
  for (int64_t i = 0; i < args.topk_groups; ++i) take_best(worth, args.groups);
  for (int64_t g = 0; g < args.groups; ++g) {
    for (int64_t i = 0; i < size && worth[g] != kTaken; ++i) candidates[g * size + i] = kTaken;
  }
}

// Element `i` of a vector of weights.
VLLM_MS_INLINE float element(const Weight &weight, int64_t i) {
  float value = 0.0f;
  VLLM_MS_DISPATCH_FLOAT(weight.dtype, W, { value = to_float(static_cast<const W *>(weight.data)[i]); });
  return value;
}

// Counts `expert` for its group, and marks the experts that remain of it as taken once it has given its part.
void count_for_group(const MoeRouteArgs &args, int64_t expert, float *candidates, float *chosen) {
  const int64_t size = args.experts / args.groups, group = expert / size;
  if (++chosen[group] < static_cast<float>(args.top_k / args.topk_groups)) return;
  for (int64_t i = 0; i < size; ++i) candidates[group * size + i] = kTaken;
}

// groups: temporary memory for a value per group.
void choose(const MoeRouteArgs &args, const float *scores, float *candidates, float *groups, float *out) {
  store(candidates + padded_size(args.experts) - kLanes, set1(kTaken));
  for (int64_t i = 0; i < args.experts; ++i) {
    float value = scores[i];
    if (args.bias) value += element(args.bias, i);
    candidates[i] = value > -FLT_MAX ? value : -FLT_MAX;  // NaN too
  }
  if (args.topk_groups < args.groups) keep_best_groups(args, candidates, groups);
  if (args.balanced) std::memset(groups, 0, args.groups * sizeof(float));
  float sum = 0.0f;
  for (int64_t j = 0; j < args.top_k; ++j) {
    const int64_t expert = take_best(candidates, args.experts);
    out[j] = static_cast<float>(expert);
    out[args.top_k + j] = scores[expert];
    sum += scores[expert];
    if (args.balanced) count_for_group(args, expert, candidates, groups);
  }
  if (sum < kSmallestSum) sum = kSmallestSum;
  const float factor = args.renormalize ? args.scale / sum : args.scale;
  for (int64_t j = 0; j < args.top_k; ++j) out[args.top_k + j] *= factor;
  for (int64_t j = 0; j < args.top_k && args.expert_scale; ++j) {
    out[args.top_k + j] *= element(args.expert_scale, static_cast<int64_t>(out[j]));
  }
}

}  // namespace

void moe_route(const MoeRouteArgs &args) {
  constexpr int64_t kElementsPerChunk = 4096;
  const int64_t padded = padded_size(args.experts);
  const int64_t cost = args.experts * (args.top_k + 8);
  parallel_for(args.rows, (kElementsPerChunk + cost - 1) / cost, [&](int64_t begin, int64_t end) {
    const Scratch scratch((2 * padded + padded_size(args.groups)) * sizeof(float));
    float *scores = scratch.as<float>(), *candidates = scores + padded, *groups = candidates + padded;
    for (int64_t r = begin; r < end; ++r) {
      score(args, args.logits + r * args.experts, padded, scores);
      choose(args, scores, candidates, groups, args.out + r * 2 * args.top_k);
    }
  });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

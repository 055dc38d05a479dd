// Sampling without sorting the vocabulary. A row is cut into blocks whose largest logits tell, after one pass, which
// blocks can hold a kept token; what top-k and top-p need to order is then collected, and is small but for flat rows.
#include "sample.h"

#include <cfloat>

#include "../parallel.h"
#include "../vec_math.h"
#include "sample_boundary.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kBlocksPerChunk = 64;
constexpr float kFar = 80.0f;  // e^-80 is far below what a uniform double can tell from zero

typedef double DoubleVec __attribute__((vector_size(8 * kLanes)));

struct Row {
  const float *x;
  int64_t vocab;

  int64_t blocks() const { return (vocab + kBlock - 1) / kBlock; }
  int64_t end_of(int64_t block) const { return (block + 1) * kBlock < vocab ? (block + 1) * kBlock : vocab; }
};

VLLM_MS_INLINE int64_t min_size(int64_t a, int64_t b) { return a < b ? a : b; }

// The elements from i to `end`, at most kLanes; lanes beyond are -inf.
VLLM_MS_INLINE Vec load_logits(const float *x, int64_t i, int64_t end) {
  if (i + kLanes <= end) return load(x + i);
  float padded[kLanes];
  for (float &value : padded) value = -__builtin_inff();
  std::memcpy(padded, x + i, (end - i) * sizeof(float));
  return load(padded);
}

// Proportional to the probability: 1 for the largest logit.
VLLM_MS_INLINE Vec weight_of(Vec logits, float largest) {
  const Vec distance = logits - largest;
  return distance > -kFar ? vexp(distance) : zero();
}

// Lane 0 to the last, so that the order is fixed.
VLLM_MS_INLINE double sum_of(DoubleVec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

struct Maxima {
  float *of_block;  // [blocks]
  float largest;
  bool has_nan;
};

// Largest logits of all blocks and of the row; where there is a NaN the others mean nothing.
Maxima find_maxima(Row row, float *of_block) {
  int has_nan = 0;
  parallel_for(row.blocks(), kBlocksPerChunk, [row, of_block, &has_nan](int64_t begin, int64_t end) {
    IVec unordered{};
    for (int64_t b = begin; b < end; ++b) {
      Vec largest = set1(-__builtin_inff());
      for (int64_t i = b * kBlock, last = row.end_of(b); i < last; i += kLanes) {
        const Vec logits = load_logits(row.x, i, last);
        unordered |= logits != logits;
        largest = vmax(largest, logits);
      }
      of_block[b] = hmax(largest);
    }
    int any = 0;
    for (int i = 0; i < kLanes; ++i) any |= unordered[i];
    if (any) __atomic_store_n(&has_nan, 1, __ATOMIC_RELAXED);
  });
  Maxima maxima{of_block, -__builtin_inff(), has_nan != 0};
  for (int64_t b = 0; b < row.blocks(); ++b) {
    if (of_block[b] > maxima.largest) maxima.largest = of_block[b];
  }
  return maxima;
}

int64_t argmax(Row row, const Maxima &maxima) {
  if (maxima.has_nan) {
    for (int64_t i = 0; i < row.vocab; ++i) {
      if (row.x[i] != row.x[i]) return i;
    }
  }
  for (int64_t b = 0; b < row.blocks(); ++b) {
    if (maxima.of_block[b] != maxima.largest) continue;
    for (int64_t i = b * kBlock; i < row.end_of(b); ++i) {
      if (row.x[i] == maxima.largest) return i;
    }
  }
  return 0;
}

// The summed weight of every block.
void find_masses(Row row, const Maxima &maxima, double *masses) {
  parallel_for(row.blocks(), kBlocksPerChunk, [row, &maxima, masses](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      masses[b] = 0;
      if (!(maxima.of_block[b] - maxima.largest > -kFar)) continue;
      DoubleVec sum{};
      for (int64_t i = b * kBlock, last = row.end_of(b); i < last; i += kLanes) {
        sum += __builtin_convertvector(weight_of(load_logits(row.x, i, last), maxima.largest), DoubleVec);
      }
      masses[b] = sum_of(sum);
    }
  });
}

double sum_of(const double *masses, int64_t blocks) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += masses[b];
  return sum;
}

// The first position at which `sum` plus the weights up to it exceeds `target`, else the last of positive weight.
int64_t first_beyond(const float *weights, int64_t size, double sum, double target) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (weights[i] == 0) continue;
    found = i;
    sum += weights[i];
    if (sum > target) break;
  }
  return found;
}

void weigh(const float *x, int64_t size, float largest, float *weights) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec weight = weight_of(load_logits(x, i, size), largest);
    store_n(weights + i, weight, min_size(size - i, kLanes));
  }
}

// A token of the whole row.
int64_t draw(Row row, const Maxima &maxima, const double *masses, double uniform) {
  const double target = uniform * sum_of(masses, row.blocks());
  int64_t block = 0;
  double before = 0, sum = 0;
  for (int64_t b = 0; b < row.blocks(); ++b) {
    if (masses[b] == 0) continue;
    block = b;
    before = sum;
    sum += masses[b];
    if (sum > target) break;
  }
  const int64_t begin = block * kBlock, size = row.end_of(block) - begin;
  float weights[kBlock];
  weigh(row.x + begin, size, maxima.largest, weights);
  return begin + first_beyond(weights, size, before, target);
}

// The tokens that may be kept, in the order of the vocabulary.
struct Candidates {
  float *x, *weights;
  int32_t *index;
  int64_t size;

  template <class Keep>
  void filter(Keep keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool stays = keep(x[i]);
      x[kept] = x[i];
      weights[kept] = weights[i];
      index[kept] = index[i];
      kept += stays;
    }
    size = kept;
  }

  double mass() const {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += weights[i];
    return sum;
  }
};

// How many logits the blocks have that hold one of `lowest` or more.
int64_t count_in_blocks(Row row, const Maxima &maxima, float lowest) {
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks(); ++b) count += maxima.of_block[b] >= lowest ? kBlock : 0;
  return count;
}

void collect(Row row, const Maxima &maxima, float lowest, Candidates *candidates) {
  int64_t size = 0;
  for (int64_t b = 0; b < row.blocks(); ++b) {
    if (!(maxima.of_block[b] >= lowest)) continue;
    for (int64_t i = b * kBlock, last = row.end_of(b); i < last; ++i) {
      candidates->x[size] = row.x[i];
      candidates->index[size] = static_cast<int32_t>(i);
      size += row.x[i] >= lowest;
    }
  }
  candidates->size = size;
  weigh(candidates->x, size, maxima.largest, candidates->weights);
}

// The largest logits of k blocks are k logits, so the k-th largest logit is not below the smallest of them.
float lowest_for_top_k(Row row, const Maxima &maxima, int64_t k) {
  if (k > row.blocks()) return -FLT_MAX;
  const float lowest = find_boundary(maxima.of_block, nullptr, row.blocks(), maxima.largest, k).value;
  return lowest > -FLT_MAX ? lowest : -FLT_MAX;
}

// All tokens of less than half of (1 - p) / vocab together have less than half of what top-p may leave out.
float lowest_for_top_p(Row row, const Maxima &maxima, double p, double mass) {
  const double lowest = maxima.largest + __builtin_log(0.5 * (1.0 - p) * mass / row.vocab);
  return lowest > -FLT_MAX ? static_cast<float>(lowest) : -FLT_MAX;
}

void keep_top_k(Candidates *candidates, float largest, int64_t k) {
  if (candidates->size <= k) return;
  const float smallest = find_boundary(candidates->x, nullptr, candidates->size, largest, k).value;
  candidates->filter([smallest](float x) { return x >= smallest; });
}

void keep_top_p(Candidates *candidates, float largest, double target) {
  const Boundary boundary = find_boundary(candidates->x, candidates->weights, candidates->size, largest, target);
  double sum = boundary.above;
  bool first = true;  // of those at the boundary: it is needed whatever the sum
  const Vec weight = weight_of(set1(boundary.value), largest);
  candidates->filter([&](float x) {
    if (x != boundary.value) return x > boundary.value;
    const bool needed = first || sum < target;
    first = false;
    sum += weight[0];
    return needed;
  });
}

struct Parameters {
  int64_t k;  // 0: all
  double p;   // 1: all
  double uniform;
};

Parameters parameters_of(const SampleArgs &args, int64_t row) {
  const int64_t k = args.top_k ? args.top_k[row] : 0;
  const double p = args.top_p ? args.top_p[row] : 1.0;
  return {k > 0 && k < args.logits.vocab ? k : 0, p < 1.0 ? (p > 0.0 ? p : 0.0) : 1.0, args.uniform[row]};
}

int64_t sample(Row row, const Parameters &parameters) {
  const Scratch block_memory(row.blocks() * (sizeof(double) + sizeof(float)));
  double *masses = block_memory.as<double>();
  const Maxima maxima = find_maxima(row, reinterpret_cast<float *>(masses + row.blocks()));
  if (maxima.has_nan || !(__builtin_fabsf(maxima.largest) <= FLT_MAX)) return argmax(row, maxima);
  const bool by_k = parameters.k > 0, by_p = parameters.p < 1.0;
  if (!by_k) find_masses(row, maxima, masses);
  if (!by_k && !by_p) return draw(row, maxima, masses, parameters.uniform);

  double mass = by_k ? 0.0 : sum_of(masses, row.blocks());
  const float lowest = by_k ? lowest_for_top_k(row, maxima, parameters.k)
                            : lowest_for_top_p(row, maxima, parameters.p, mass);
  const int64_t capacity = count_in_blocks(row, maxima, lowest);
  const Scratch memory(capacity * (2 * sizeof(float) + sizeof(int32_t)));
  float *x = memory.as<float>();
  Candidates candidates{x, x + capacity, reinterpret_cast<int32_t *>(x + 2 * capacity), 0};
  collect(row, maxima, lowest, &candidates);
  if (by_k) {
    keep_top_k(&candidates, maxima.largest, parameters.k);
    mass = candidates.mass();
  }
  if (by_p) {
    keep_top_p(&candidates, maxima.largest, parameters.p * mass);
    mass = candidates.mass();
  }
  return candidates.index[first_beyond(candidates.weights, candidates.size, 0.0, parameters.uniform * mass)];
}

// Threads share the rows, or the blocks of one row after the other where there are fewer rows than threads.
template <class F>
void for_each_row(const LogitRows &logits, F f) {
  const int64_t grain = logits.rows < num_threads() ? logits.rows : 1;
  parallel_for(logits.rows, grain, [&logits, &f](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r, Row{logits.data + r * logits.stride, logits.vocab});
  });
}

}  // namespace

void argmax_rows(const ArgmaxArgs &args) {
  for_each_row(args.logits, [&args](int64_t r, Row row) {
    const Scratch memory(row.blocks() * sizeof(float));
    args.out[r] = argmax(row, find_maxima(row, memory.as<float>()));
  });
}

void sample_rows(const SampleArgs &args) {
  for_each_row(args.logits, [&args](int64_t r, Row row) { args.out[r] = sample(row, parameters_of(args, r)); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

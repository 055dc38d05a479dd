// The lightning indexer without MindSpore: what it selects by float64 scores, and the choice of the largest values.
#include <algorithm>
#include <iterator>

#include "indexer_plan.h"
#include "kernels/top_positions.h"
#include "testing.h"

using namespace vllm_ms;
using testing::Random;
using testing::Stored;

namespace {

std::vector<float> best_of(const std::vector<float> &scores, int64_t top_k) {
  std::vector<float> out(top_k, NAN);
  std::vector<uint32_t> workspace(2 * scores.size());
  top_positions({scores.data(), static_cast<int64_t>(scores.size()), top_k, out.data(), workspace.data()});
  return out;
}

// By a stable sort: of equal scores the lower positions, NaN last.
std::vector<float> sorted_best(const std::vector<float> &scores, int64_t top_k) {
  std::vector<int64_t> order(scores.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (std::isnan(scores[a]) || std::isnan(scores[b])) return !std::isnan(scores[a]) && std::isnan(scores[b]);
    return scores[a] > scores[b];
  });
  order.resize(top_k);
  std::sort(order.begin(), order.end());
  return {order.begin(), order.end()};
}

// One token of a request with `keys` tokens in blocks of `block` slots, in reverse order in the cache.
struct OneToken {
  int64_t heads, size, rotated, keys, block;
  std::vector<float> query, key_weights, cos_sin, gamma, beta;
  Stored cache;
  std::vector<int32_t> table, starts{0, 1}, lengths;
  int64_t position, slot;

  OneToken(Random &random, int64_t heads, int64_t size, int64_t rotated, int64_t keys, int64_t block, DType dtype)
      : heads(heads), size(size), rotated(rotated), keys(keys), block(block),
        query(random.normals(heads * size)),
        key_weights(random.normals(size + heads)),
        cos_sin(random.normals(keys * rotated)),
        gamma(random.normals(size)),
        beta(random.normals(size)),
        cache(random.normals((keys + block - 1) / block * block * size), dtype),
        lengths{static_cast<int32_t>(keys)},
        position(keys - 1) {
    const int64_t blocks = (keys + block - 1) / block;
    for (int64_t i = 0; i < blocks; ++i) table.push_back(static_cast<int32_t>(blocks - 1 - i));
    slot = table[position / block] * block + position % block;
  }

  std::vector<float> run(int64_t top_k) {
    IndexerInputs in{};
    in.step.query = query.data();
    in.step.query_stride = heads * size;
    in.step.num_tokens = 1;
    in.step.cache = {cache.data(), cache.weight().dtype, static_cast<int64_t>(table.size()) * block, 1, size, 0};
    in.step.block_table = table.data();
    in.step.num_requests = 1;
    in.step.max_blocks = table.size();
    in.step.query_start_loc = starts.data();
    in.step.seq_lens = lengths.data();
    in.step.num_heads = heads;
    in.step.block_size = block;
    in.rotation.head_size = size;
    in.rotation.positions = &position;
    in.rotation.cos_sin = {cos_sin.data(), DType::f32};
    in.rotation.rotary_dim = rotated;
    in.key_weights = key_weights.data();
    in.key_weights_stride = size + heads;
    in.key_norm.width = size;
    in.key_norm.weight = {gamma.data(), DType::f32};
    in.key_norm.bias = {beta.data(), DType::f32};
    in.key_norm.norm = Norm::layer;
    in.key_norm.eps = 1e-6f;
    in.slot_mapping = &slot;
    in.top_k = top_k;
    check_indexer(in);
    std::vector<float> out(top_k, NAN);
    lightning_indexer(in, out.data());
    return out;
  }

  std::vector<double> rotate(std::vector<double> x) const {
    const float *table_row = cos_sin.data() + position * rotated;
    for (int64_t i = 0; i < rotated / 2; ++i) {
      const double a = x[i], b = x[i + rotated / 2], c = table_row[i], s = table_row[i + rotated / 2];
      x[i] = a * c - b * s;
      x[i + rotated / 2] = b * c + a * s;
    }
    return x;
  }

  std::vector<double> own_key() const {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < size; ++i) mean += key_weights[i] / static_cast<double>(size);
    for (int64_t i = 0; i < size; ++i) variance += std::pow(key_weights[i] - mean, 2) / static_cast<double>(size);
    std::vector<double> key(size);
    for (int64_t i = 0; i < size; ++i) {
      key[i] = (key_weights[i] - mean) / std::sqrt(variance + 1e-6) * gamma[i] + beta[i];
    }
    return rotate(key);
  }

  std::vector<double> scores() const {
    std::vector<double> found(keys, 0.0);
    const std::vector<double> own = own_key();
    for (int64_t head = 0; head < heads; ++head) {
      const std::vector<double> q = rotate({query.begin() + head * size, query.begin() + (head + 1) * size});
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t at = (table[key / block] * block + key % block) * size;
        double product = 0;
        for (int64_t d = 0; d < size; ++d) product += q[d] * (key == position ? own[d] : cache[at + d]);
        found[key] += key_weights[size + head] * std::max(product, 0.0);
      }
    }
    return found;
  }
};

}  // namespace

TEST(top_positions_are_those_of_a_stable_sort) {
  testing::for_each_isa([] {
    Random random(1);
    for (int64_t size : {2, 7, 64, 1000, 5003}) {
      for (int64_t different : {1, 3, 50, 1 << 20}) {
        std::vector<float> scores(size);
        for (float &score : scores) score = static_cast<float>(random.below(different)) * 0.37f - 0.4f;
        const float special[] = {NAN, -0.0f, 0.0f, INFINITY, -INFINITY};
        if (size > 10) std::copy(std::begin(special), std::end(special), scores.begin() + 3);
        for (int64_t top_k : {int64_t{1}, size / 2, size - 1, size}) {
          CHECK(best_of(scores, top_k) == sorted_best(scores, top_k)) << top_k << " of " << size << ", " << different;
        }
      }
    }
  });
}

TEST(indexer_selects_the_best_keys) {
  testing::for_each_isa([] {
    Random random(2);
    for (DType dtype : testing::kFloatTypes) {
      for (int64_t size : {6, 37, 64}) {
        for (int64_t keys : {31, 64, 700}) {
          OneToken token(random, 5, size, 6, keys, 9, dtype);
          const std::vector<double> scores = token.scores();  // before the token's key is in the cache
          const int64_t top_k = keys / 3;
          const std::vector<float> found = token.run(top_k);
          std::vector<double> order = scores;
          std::nth_element(order.begin(), order.begin() + top_k - 1, order.end(), std::greater<double>());
          const double allowed = (dtype == DType::f32 ? 1e-5 : 5e-2) * std::sqrt(5.0 * size);
          std::vector<bool> chosen(keys, false);
          for (float position : found) chosen[static_cast<int64_t>(position)] = true;
          CHECK(std::count(chosen.begin(), chosen.end(), true) == top_k) << size << " " << keys;
          for (int64_t key = 0; key < keys; ++key) {
            const double above = scores[key] - order[top_k - 1];
            CHECK(chosen[key] ? above >= -allowed : above <= allowed)
                << testing::dtype_name(dtype) << " " << size << ", key " << key << " of " << keys << ": " << above;
          }
        }
      }
    }
  });
}

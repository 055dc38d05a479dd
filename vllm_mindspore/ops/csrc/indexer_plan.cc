#include "indexer_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "kernels/top_positions.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kMaxPositions = 1 << 24;      // integers up to here are exact as float
constexpr int64_t kScores = 4 << 20;            // at once: bounds what scores take
constexpr int64_t kQueries = 128;               // at once: bounds what rotated queries take
constexpr int64_t kQueriesPerTask = 8;          // that share the tiles of a task
constexpr int64_t kKeysPerTask = 8 * kTileKeys;
constexpr int64_t kMinParallelCost = 1 << 16;   // multiply-adds below which a second thread does not pay
constexpr int64_t kElementsPerChunk = 1 << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What scores of one query take: whole tiles.
int64_t padded_keys(int64_t keys) { return ceil_div(keys, kTileKeys) * kTileKeys; }

// Some tokens with more than top_k keys.
class Selection {
 public:
  Selection(const IndexerInputs &in, std::vector<IndexerQuery> &queries, int64_t scores, float *out)
      : in_(in),
        queries_(queries),
        count_(static_cast<int64_t>(queries.size())),
        heads_size_(in.step.num_heads * padded_head(in.step.cache.head_size)),
        heads_(count_ * heads_size_ * sizeof(float)),
        scores_(scores * sizeof(float)),
        out_(out) {
    float *next = scores_.as<float>();
    for (int64_t i = 0; i < count_; ++i) {
      queries_[i].heads = heads_.as<float>() + i * heads_size_;
      queries_[i].scores = next;
      next += padded_keys(queries_[i].num_keys);
    }
  }

  void run() {
    rotate();
    score();
    select();
  }

 private:
  struct Job {
    const IndexerQuery *queries;
    int64_t num_queries, key_begin, key_end;
  };

  void rotate() const {
    parallel_for(count_, ceil_div(kElementsPerChunk, heads_size_), [&](int64_t begin, int64_t end) {
      const Scratch workspace(padded_head(in_.step.cache.head_size) * sizeof(float));
      for (int64_t i = begin; i < end; ++i) indexer_rotate({&in_, &queries_[i], workspace.as<float>()});
    });
  }

  void score() const {
    std::vector<Job> jobs;
    for (int64_t first = 0, end = 0; first < count_; first = end) {
      while (end < count_ && end - first < kQueriesPerTask && queries_[end].request == queries_[first].request) ++end;
      const int64_t keys = queries_[end - 1].num_keys;
      for (int64_t begin = 0; begin < keys; begin += kKeysPerTask) {
        jobs.push_back({&queries_[first], end - first, begin, std::min(keys, begin + kKeysPerTask)});
      }
    }
    Ranges ranges(static_cast<int64_t>(jobs.size()), 1);
    parallel_for(ranges.workers(), 1, [&](int64_t, int64_t) {
      const Scratch workspace(indexer_workspace(in_) * sizeof(float));
      ranges.for_each([&](int64_t i, int64_t) {
        const Job &job = jobs[i];
        indexer_score({&in_, job.queries, job.num_queries, job.key_begin, job.key_end, workspace.as<float>()});
      });
    });
  }

  void select() const {
    parallel_for(count_, ceil_div(kElementsPerChunk, queries_[0].num_keys), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const IndexerQuery &query = queries_[i];
        const Scratch workspace(2 * query.num_keys * sizeof(uint32_t));
        top_positions({query.scores, query.num_keys, in_.top_k, out_ + query.token * in_.top_k,
                       workspace.as<uint32_t>()});
      }
    });
  }

  const IndexerInputs &in_;
  std::vector<IndexerQuery> &queries_;
  const int64_t count_, heads_size_;
  const Scratch heads_, scores_;
  float *out_;
};

void write_keys(const IndexerInputs &in) {
  const int64_t size = in.step.cache.head_size, grain = ceil_div(kElementsPerChunk, size);
  parallel_for(in.step.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const Scratch key(size * sizeof(float));
    indexer_write({&in, key.as<float>(), begin, end});
  });
}

// Positions [0, keys), then -1.
void write_all(float *row, int64_t keys, int64_t top_k) {
  for (int64_t i = 0; i < top_k; ++i) row[i] = i < keys ? static_cast<float>(i) : -1.0f;
}

}  // namespace

void check_indexer(const IndexerInputs &in) {
  check_attention(in.step);
  for (int64_t request = 0; request < in.step.num_requests; ++request) {
    if (in.step.seq_lens[request] <= kMaxPositions) continue;
    throw std::invalid_argument("request " + std::to_string(request) + ": seq_lens " +
                                std::to_string(in.step.seq_lens[request]) + ", supported up to " +
                                std::to_string(kMaxPositions));
  }
}

void lightning_indexer(const IndexerInputs &in, float *out) {
  write_keys(in);
  std::vector<IndexerQuery> queries;
  int64_t scores = 0, token = 0;
  const auto flush = [&]() {
    if (!queries.empty()) Selection(in, queries, scores, out).run();
    queries.clear();
    scores = 0;
  };
  const auto skip = [&](int64_t end) {  // tokens of no request
    for (; token < end; ++token) write_all(out + token * in.top_k, 0, in.top_k);
  };
  for (int64_t request = 0; request < in.step.num_requests; ++request) {
    const int64_t end = in.step.query_start_loc[request + 1];
    skip(in.step.query_start_loc[request]);
    for (; token < end; ++token) {
      const int64_t keys = in.step.seq_lens[request] - (end - token) + 1;
      if (keys <= in.top_k) {
        write_all(out + token * in.top_k, keys, in.top_k);
        continue;
      }
      if (static_cast<int64_t>(queries.size()) == kQueries || scores + padded_keys(keys) > kScores) flush();
      queries.push_back({request, token, keys, nullptr, nullptr});
      scores += padded_keys(keys);
    }
  }
  flush();
  skip(in.step.num_tokens);
}

}  // namespace vllm_ms

// Exchanges of tokens between ranks against the same arithmetic in one place, in float64.
#include "exchange.h"

#include <algorithm>
#include <cmath>

#include "group_ranks.h"
#include "testing.h"

using namespace vllm_ms;
using testing::expect_none;
using testing::with_ranks;

namespace {

struct Step {
  std::vector<int32_t> ranks;  // of all tokens
  std::vector<float> rows, routing;
  int64_t total, top_k, width;
  const float *row(int64_t token) const { return rows.data() + token * width; }
  const float *ids(int64_t token) const { return routing.data() + token * 2 * top_k; }
};

// counts: tokens of each rank. Every 7th id is no expert's.
Step make_step(const std::vector<int64_t> &counts, int64_t places, int64_t top_k, int64_t width, uint32_t seed) {
  Step step{{}, {}, {}, 0, top_k, width};
  for (size_t rank = 0; rank < counts.size(); ++rank) step.ranks.insert(step.ranks.end(), counts[rank], rank);
  step.total = step.ranks.size();
  testing::Random random(seed);
  step.rows = random.normals(step.total * width);
  for (int64_t i = 0; i < step.total; ++i) {
    for (int64_t j = 0; j < top_k; ++j) {
      const float id = static_cast<float>((i * 5 + j * 3 + seed) % places);
      step.routing.push_back((i + j + seed) % 7 == 0 ? -1.0f : id);
    }
    for (int64_t j = 0; j < top_k; ++j) step.routing.push_back(0.5f);
  }
  return step;
}

// Which of the group's ranks has the place, by definition: see ExpertHolders.
bool has(const ExpertHolders &holders, int rank, float id) {
  if (id < 0) return false;
  if (holders.capacity == 0) return true;
  for (int64_t slot = 0; slot < holders.capacity; ++slot) {
    if (id == (rank * holders.columns + holders.column) * holders.capacity + slot) return true;
  }
  return false;
}

bool needs(const Step &step, const ExpertHolders &holders, int rank, int64_t token) {
  return std::any_of(step.ids(token), step.ids(token) + step.top_k, [&](float id) { return has(holders, rank, id); });
}

void check_step(Group &group, int rank, const Step &step, const ExpertHolders &holders) {
  const auto fail = [&](const std::string &what) { throw std::runtime_error(what); };
  const StepTokens tokens(step.ranks.data(), step.total, group.size());
  const int64_t first = tokens.first[rank], count = tokens.count[rank], width = step.width, pair = 2 * step.top_k;
  std::vector<float> routing(step.total * pair), rows(step.total * width), out(count * width);
  const uint32_t gathering = begin_gather_rows(group, tokens, step.ids(first), pair);
  const uint32_t dispatching = begin_dispatch(group, tokens, step.row(first), width);
  end_gather_rows(group, gathering, tokens, step.ids(first), pair, routing.data());
  if (routing != step.routing) fail("gathered rows differ");
  end_dispatch(group, dispatching, tokens, holders, routing.data(), step.top_k, step.row(first), width, rows.data());
  std::vector<float> results(step.total * width, 1e30f);  // of tokens without an expert here, nobody may read them
  for (int64_t t = 0; t < step.total; ++t) {
    const bool needed = needs(step, holders, rank, t);
    for (int64_t i = 0; i < width; ++i) {
      if (rows[t * width + i] != (needed ? step.row(t)[i] : 0.0f)) fail("dispatched rows differ");
      if (needed) results[t * width + i] = (rank + 1) * step.row(t)[i];
    }
  }
  const uint32_t combining = begin_combine(group, tokens, holders, routing.data(), step.top_k, results.data(), width);
  end_combine(group, combining, tokens, holders, routing.data(), step.top_k, results.data(), width, out.data());
  for (int64_t t = 0; t < count; ++t) {
    double factor = 0;
    for (int other = 0; other < group.size(); ++other) factor += needs(step, holders, other, first + t) ? other + 1 : 0;
    for (int64_t i = 0; i < width; ++i) {
      if (std::abs(out[t * width + i] - factor * step.row(first + t)[i]) > 1e-5) fail("combined rows differ");
    }
  }
}

}  // namespace

TEST(exchanges_bring_each_row_to_the_ranks_that_need_it) {
  testing::for_each_isa([] {
    uint32_t seed = 1;
    for (const std::vector<int64_t> &counts : std::vector<std::vector<int64_t>>{
             {5}, {3, 4}, {0, 7}, {1, 0}, {0, 0}, {33, 2, 9}, {1, 1, 1, 1, 1}}) {
      const int size = static_cast<int>(counts.size());
      for (int64_t width : {1, 7, 64, 333}) {
        for (const ExpertHolders &holders : {ExpertHolders{0, 1, 0}, ExpertHolders{3, 1, 0}, ExpertHolders{2, 2, 1}}) {
          const int64_t places = std::max<int64_t>(1, holders.capacity) * holders.columns * size;
          const Step step = make_step(counts, places, 3, width, ++seed);
          expect_none(with_ranks(size, 4096, [&](Group &group, int rank) {  // the longest need several rounds
            for (int repeat = 0; repeat < 3; ++repeat) check_step(group, rank, step, holders);
          }));
        }
      }
    }
  });
}

TEST(token_ranks_out_of_order_are_refused) {
  for (const std::vector<int32_t> &ranks : std::vector<std::vector<int32_t>>{{1, 0}, {0, 2}, {-1, 0}}) {
    std::string error;
    try {
      StepTokens(ranks.data(), ranks.size(), 2);
    } catch (const std::invalid_argument &refused) {
      error = refused.what();
    }
    CHECK(error.find("token_ranks") != std::string::npos) << error;
  }
}

TEST(ranks_that_do_not_agree_on_their_tokens_are_named) {
  const auto errors = with_ranks(2, 4096, [](Group &group, int rank) {
    const std::vector<int32_t> ranks = rank == 0 ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0, 1, 1};
    const StepTokens tokens(ranks.data(), ranks.size(), 2);
    std::vector<float> x(6), out(9);
    end_gather_rows(group, begin_gather_rows(group, tokens, x.data(), 3), tokens, x.data(), 3, out.data());
  });
  CHECK(errors[0].find("gather_rows of 24 bytes") != std::string::npos) << errors[0];
}

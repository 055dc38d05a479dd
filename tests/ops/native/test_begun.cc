// Collectives that are begun and ended apart, against the same sums in one place, in float32 and the order of ranks.
#include "begun.h"

#include <numeric>

#include "group_ranks.h"
#include "testing.h"

using namespace vllm_ms;
using testing::expect_none;
using testing::with_ranks;

namespace {

// What arrives of a value.
float on_wire(float value, DType wire) {
  if (wire == DType::f32) return value;
  bf16 rounded;
  from_float(value, &rounded);
  return to_float(rounded);
}

float sum_at(const std::vector<std::vector<float>> &x, int64_t i, DType wire) {
  float sum = on_wire(x[0][i], wire);
  for (size_t rank = 1; rank < x.size(); ++rank) sum += on_wire(x[rank][i], wire);
  return sum;
}

void require(bool condition, const std::string &what) {
  if (!condition) throw std::runtime_error(what);
}

std::vector<std::vector<float>> inputs(int size, int64_t count, uint32_t seed) {
  testing::Random random(seed);
  std::vector<std::vector<float>> all;
  for (int rank = 0; rank < size; ++rank) all.push_back(random.normals(count));
  return all;
}

constexpr int64_t kSlot = 4096;  // most need several rounds, and those that are begun together at most one

}  // namespace

TEST(begun_collectives_end_in_another_order) {
  testing::for_each_isa([] {
    uint32_t seed = 1;
    for (DType wire : {DType::f32, DType::bf16}) {
      for (int size : {1, 2, 3, 5}) {
        for (int64_t outer : {0, 1, 3}) {
          for (int64_t inner : {1, 7, 33}) {
            const int64_t count = outer * inner;
            const auto x = inputs(size, count * size, ++seed);
            expect_none(with_ranks(size, kSlot, [&](Group &group, int rank) {
              const float *mine = x[rank].data();
              std::vector<float> sums(count), gathered(count * size), part(count);
              const uint32_t a = begin_all_reduce(group, wire, mine, count);
              const uint32_t b = begin_all_gather(group, wire, mine, outer, inner);
              const uint32_t c = begin_reduce_scatter(group, wire, mine, outer, inner);
              end_reduce_scatter(group, c, wire, mine, outer, inner, part.data());
              end_all_reduce(group, a, wire, mine, count, sums.data());
              end_all_gather(group, b, wire, mine, outer, inner, gathered.data());
              for (int64_t i = 0; i < count; ++i) {
                const int64_t row = i / inner, column = i % inner;
                require(sums[i] == sum_at(x, i, wire), "all_reduce");
                require(part[i] == sum_at(x, (row * size + rank) * inner + column, wire), "reduce_scatter");
                for (int other = 0; other < size; ++other) {
                  const float expected = on_wire(x[other][i], wire);
                  require(gathered[(row * size + other) * inner + column] == expected, "all_gather");
                }
              }
            }));
          }
        }
      }
    }
  });
}

TEST(begun_collectives_of_several_rounds) {
  for (DType wire : {DType::f32, DType::bf16}) {
    const int size = 3;
    const int64_t outer = 7, inner = 1001, count = outer * inner;
    const auto x = inputs(size, count * size, 5);
    expect_none(with_ranks(size, kSlot, [&](Group &group, int rank) {
      const float *mine = x[rank].data();
      std::vector<float> sums(count), gathered(count * size), part(count);
      end_all_reduce(group, begin_all_reduce(group, wire, mine, count), wire, mine, count, sums.data());
      uint32_t round = begin_all_gather(group, wire, mine, outer, inner);
      end_all_gather(group, round, wire, mine, outer, inner, gathered.data());
      round = begin_reduce_scatter(group, wire, mine, outer, inner);
      end_reduce_scatter(group, round, wire, mine, outer, inner, part.data());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = i / inner, column = i % inner;
        require(sums[i] == sum_at(x, i, wire), "all_reduce");
        require(part[i] == sum_at(x, (row * size + rank) * inner + column, wire), "reduce_scatter");
        require(gathered[(row * size + 1) * inner + column] == on_wire(x[1][i], wire), "all_gather");
      }
    }));
  }
}

TEST(rows_of_unlike_numbers) {
  const std::vector<std::vector<int64_t>> all_counts{{0, 0}, {3, 0}, {0, 5, 1}, {40, 1, 0, 17}};
  for (DType wire : {DType::f32, DType::bf16}) {
    for (const std::vector<int64_t> &counts : all_counts) {
      const int size = static_cast<int>(counts.size());
      const int64_t width = 37, total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
      std::vector<int32_t> ranks;
      for (int rank = 0; rank < size; ++rank) ranks.insert(ranks.end(), counts[rank], rank);
      const auto x = inputs(size, total * width, 9);
      expect_none(with_ranks(size, kSlot, [&](Group &group, int rank) {
        const StepTokens tokens(ranks.data(), total, size);
        const float *mine = x[rank].data();
        std::vector<float> out(counts[rank] * width);
        const uint32_t round = begin_reduce_scatter_rows(group, wire, tokens, mine, width);
        end_reduce_scatter_rows(group, round, wire, tokens, mine, width, out.data());
        for (size_t i = 0; i < out.size(); ++i) {
          require(out[i] == sum_at(x, tokens.first[rank] * width + i, wire), "reduce_scatter_rows");
        }
      }));
    }
  }
}

TEST(all_to_all_of_unlike_counts) {
  const std::vector<std::vector<int32_t>> all_counts{
      {0, 0, 0, 0}, {2, 0, 5, 1}, {0, 3, 1, 40, 0, 0, 2, 2, 2}, {0, 0, 0, 0, 90, 0, 0, 0, 0}};
  for (DType wire : {DType::f32, DType::bf16}) {
    for (const std::vector<int32_t> &matrix : all_counts) {
      const int size = matrix.size() == 4 ? 2 : 3;
      const int64_t width = 29;
      const RowCounts counts(matrix.data(), size);
      // The j-th row from a rank to another one says so.
      const auto value = [&](int from, int to, int64_t row, int64_t i) {
        return static_cast<float>(from + 10 * to + 100 * row) + static_cast<float>(i) / 64;
      };
      expect_none(with_ranks(size, kSlot, [&](Group &group, int rank) {
        std::vector<float> x, out(counts.sent_to(rank) * width), expected;
        for (int other = 0; other < size; ++other) {
          for (int64_t i = 0; i < counts.of(rank, other) * width; ++i) {
            x.push_back(value(rank, other, i / width, i % width));
          }
          for (int64_t i = 0; i < counts.of(other, rank) * width; ++i) {
            expected.push_back(on_wire(value(other, rank, i / width, i % width), wire));
          }
        }
        const uint32_t round = begin_all_to_all(group, wire, counts, x.data(), width);
        end_all_to_all(group, round, wire, counts, x.data(), width, out.data());
        require(out == expected, "all_to_all");
      }));
    }
  }
}

TEST(too_many_begun_at_once_are_refused) {
  const std::vector<float> x(3, 1.0f);
  for (const std::string &error : with_ranks(2, kSlot, [&](Group &group, int) {
         for (int i = 0; i <= Rounds::kDepth; ++i) begin_all_reduce(group, DType::f32, x.data(), 3);
       })) {
    CHECK(error.find("4 collectives are begun and not ended") != std::string::npos) << error;
  }
}

TEST(what_one_rank_sends_another_receives) {
  for (DType wire : {DType::f32, DType::bf16}) {
    const auto x = inputs(1, 20000, 3)[0];
    GroupOptions options{"one way", 0, 2, "", kSlot, 60, 100000, true};
    Group sender(options);
    options.memory = "/proc/self/fd/" + std::to_string(sender.file());
    options.rank = 1;
    Group receiver(options);
    std::thread other([&] {
      for (int64_t count : {0, 1, 3, 20000, 5}) send(sender, wire, x.data(), count);
    });
    for (int64_t count : {0, 1, 3, 20000, 5}) {
      std::vector<float> out(count);
      receive(receiver, wire, count, out.data());
      for (int64_t i = 0; i < count; ++i) CHECK(out[i] == on_wire(x[i], wire)) << i << " of " << count;
    }
    other.join();
    bool refused = false;
    try {
      send(receiver, wire, x.data(), 1);
    } catch (const std::runtime_error &) {
      refused = true;
    }
    CHECK(refused) << "the receiver sent";
  }
}

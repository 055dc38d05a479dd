#include "collectives.h"

#include <unistd.h>

#include <cmath>

#include "group_ranks.h"
#include "testing.h"

using namespace vllm_ms;
using testing::expect_none;
using testing::Stored;
using testing::with_ranks;

namespace {

std::vector<Stored> inputs(int size, int64_t count, DType dtype, uint32_t seed) {
  testing::Random random(seed);
  std::vector<Stored> all;
  for (int rank = 0; rank < size; ++rank) all.emplace_back(random.normals(count), dtype);
  return all;
}

// Of elements added one rank after the other.
double tolerance(DType dtype) { return dtype == DType::f32 ? 1e-6 : dtype == DType::bf16 ? 1e-2 : 2e-3; }

}  // namespace

TEST(collectives_against_float64) {
  testing::for_each_isa([] {
    uint32_t seed = 1;
    for (DType dtype : testing::kFloatTypes) {
      for (int size : {1, 2, 3, 5}) {
        for (int64_t outer : {1, 3, 40}) {
          for (int64_t inner : {1, 7, 64, 1001}) {
            const int64_t count = outer * inner, bytes = dtype_size(dtype);
            const std::vector<Stored> x = inputs(size, count * size, dtype, ++seed);
            std::vector<std::vector<char>> sums(size), gathered(size), parts(size);
            expect_none(with_ranks(size, 4096, [&](Group &group, int rank) {  // most need several rounds
              sums[rank].resize(count * bytes);
              gathered[rank].resize(count * size * bytes);
              parts[rank].resize(count * bytes);
              const void *mine = x[rank].weight().data;
              group.all_reduce(mine, count, dtype, sums[rank].data());
              group.all_gather(mine, outer, inner, dtype, gathered[rank].data());
              group.barrier();
              group.reduce_scatter(mine, outer, inner, dtype, parts[rank].data());
            }));
            const auto value = [&](const std::vector<char> &data, int64_t i) {
              double result = 0;
              VLLM_MS_DISPATCH_FLOAT(dtype, T, { result = to_float(reinterpret_cast<const T *>(data.data())[i]); });
              return result;
            };
            for (int rank = 0; rank < size; ++rank) {
              CHECK(sums[rank] == sums[0] && gathered[rank] == gathered[0]) << "rank " << rank << " of " << size;
              double worst = 0;
              for (int64_t i = 0; i < count; ++i) {
                const int64_t row = i / inner, column = i % inner;
                double sum = 0, part = 0;
                for (int r = 0; r < size; ++r) {
                  sum += x[r][i];
                  part += x[r][(row * size + rank) * inner + column];
                  worst = std::max(worst, std::abs(value(gathered[rank], (row * size + r) * inner + column) - x[r][i]));
                }
                worst = std::max(worst, std::abs(value(sums[rank], i) - sum) / (1 + std::abs(sum)));
                worst = std::max(worst, std::abs(value(parts[rank], i) - part) / (1 + std::abs(part)));
              }
              CHECK(worst < tolerance(dtype)) << worst << " " << testing::dtype_name(dtype) << " " << size << " ranks, "
                                              << outer << " x " << inner;
            }
          }
        }
      }
    }
  });
}

TEST(collectives_in_place_and_often) {
  for (int size : {2, 4}) {
    expect_none(with_ranks(size, 4096, [&](Group &group, int rank) {
      std::vector<float> x(333);
      for (int repeat = 0; repeat < 3000; ++repeat) {
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(rank + repeat + i);
        group.all_reduce(x.data(), x.size(), DType::f32, x.data());
        const float first = size * (size - 1) / 2 + size * repeat, last = first + size * (x.size() - 1);
        if (x.front() != first || x.back() != last) throw std::runtime_error("wrong sum");
      }
    }));
  }
}

TEST(rounds_may_be_begun_together_and_ended_in_any_order) {
  for (int size : {2, 3}) {
    expect_none(with_ranks(size, 4096, [&](Group &group, int rank) {
      for (int repeat = 0; repeat < 1000; ++repeat) {
        const auto bytes_of = [](int) { return static_cast<int64_t>(sizeof(int)); };
        const auto all = [](int) { return Part{0, sizeof(int)}; };
        std::vector<uint32_t> rounds;
        for (int i = 0; i < Rounds::kDepth; ++i) {
          rounds.push_back(group.post(Collective::barrier, sizeof(int), [&](char *slot) {
            const int value = repeat + i * 100 + rank;
            std::memcpy(slot, &value, sizeof(value));
          }, all));
        }
        for (int i : {2, 0, 3, 1}) {
          group.take(rounds[i], Collective::barrier, bytes_of, [&] {
            for (int other = 0; other < size; ++other) {
              int value;
              std::memcpy(&value, group.slot(other, rounds[i]), sizeof(value));
              if (value != repeat + i * 100 + other) throw std::runtime_error("another round's value");
            }
          });
        }
      }
    }));
  }
}

TEST(more_rounds_than_there_are_slots_are_refused) {
  const auto errors = with_ranks(2, 4096, [](Group &group, int) {
    const auto none = [](int) { return Part{}; };
    for (int i = 0; i <= Rounds::kDepth; ++i) group.post(Collective::barrier, 0, [](char *) {}, none);
  });
  for (const std::string &error : errors) CHECK(error.find("4 collectives are begun") != std::string::npos) << error;
}

TEST(collectives_that_do_not_match_are_named) {
  const auto errors = with_ranks(2, 4096, [](Group &group, int rank) {
    std::vector<float> x(8);
    if (rank == 0) group.all_reduce(x.data(), 8, DType::f32, x.data());
    if (rank == 1) group.all_reduce(x.data(), 4, DType::f32, x.data());
  });
  for (const std::string &error : errors) {
    CHECK(error.find("all_reduce of 16 bytes") != std::string::npos) << error;
    CHECK(error.find("all_reduce of 32 bytes") != std::string::npos) << error;
  }
}

TEST(a_rank_that_does_not_come_or_fails_is_named) {
  float x = 0;
  auto errors = with_ranks(3, 4096, [&](Group &group, int rank) {
    float out;
    if (rank != 2) group.all_reduce(&x, 1, DType::f32, &out);
  }, 0.2);
  CHECK(errors[0].find("rank 2") != std::string::npos && errors[0].find("within 0.2 s") != std::string::npos) << errors[0];
  CHECK(!errors[1].empty());
  errors = with_ranks(3, 4096, [&](Group &group, int rank) {
    float out;
    if (rank == 2) {
      usleep(150000);  // the others sleep by now
      group.fail("out of luck");
    } else {
      group.all_reduce(&x, 1, DType::f32, &out);
    }
  });
  for (int rank : {0, 1}) CHECK(errors[rank].find("out of luck") != std::string::npos) << errors[rank];
}

TEST(memory_of_another_group_is_refused) {
  const Group group({"test", 0, 2, "", 4096, 1, 0});
  const std::string memory = "/proc/self/fd/" + std::to_string(group.file());
  const auto refused = [](const GroupOptions &options) {
    try {
      Group other(options);
    } catch (const std::runtime_error &error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(refused({"test", 1, 3, memory, 0, 1, 0}).find("made for 2 ranks") != std::string::npos);
  CHECK(!refused({"test", 1, 2, "/proc/self/exe", 0, 1, 0}).empty());
  CHECK(!refused({"test", 1, 2, "/nonexistent", 0, 1, 0}).empty());
  CHECK(!refused({"test", 2, 2, "", 4096, 1, 0}).empty());
}

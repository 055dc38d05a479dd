// Ranks of a group as threads of a test, each with a Group of its own on one memory.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "collectives.h"
#include "testing.h"

namespace testing {

// Runs body(group, rank) on `size` threads. Returns what they threw.
inline std::vector<std::string> with_ranks(int size, int64_t slot_bytes,
                                           const std::function<void(vllm_ms::Group &, int)> &body, double timeout = 60) {
  vllm_ms::GroupOptions options{"test", 0, size, "", slot_bytes, timeout, 100000};
  std::vector<std::unique_ptr<vllm_ms::Group>> groups;
  groups.push_back(std::make_unique<vllm_ms::Group>(options));
  options.memory = "/proc/self/fd/" + std::to_string(groups[0]->file());
  for (options.rank = 1; options.rank < size; ++options.rank) {
    groups.push_back(std::make_unique<vllm_ms::Group>(options));
  }
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*groups[rank], rank);
      } catch (const std::runtime_error &error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  return errors;
}

inline void expect_none(const std::vector<std::string> &errors) {
  for (const std::string &error : errors) CHECK(error.empty()) << error;
}

}  // namespace testing

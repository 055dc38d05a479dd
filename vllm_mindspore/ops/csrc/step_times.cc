#include "step_times.h"

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

namespace vllm_ms {
namespace {

struct Spent {
  int64_t calls = 0, nanoseconds = 0;
};

std::atomic<bool> measuring{false};
std::mutex mutex;  // guards `times`
std::map<std::pair<std::string, int64_t>, Spent> times;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void measure_steps(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (on) times.clear();
  measuring.store(on, std::memory_order_relaxed);
}

std::string step_times() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::ostringstream text;
  for (const auto &[key, spent] : times) {
    text << key.first << ' ' << key.second << ' ' << spent.calls << ' ' << spent.nanoseconds << '\n';
  }
  return text.str();
}

StepTimer::StepTimer(const std::string &name, int64_t columns)
    : name_(name), columns_(columns), begin_(measuring.load(std::memory_order_relaxed) ? now() : 0) {}

StepTimer::~StepTimer() {
  if (begin_ == 0) return;
  const int64_t taken = now() - begin_;
  const std::lock_guard<std::mutex> lock(mutex);
  Spent &spent = times[{name_, columns_}];
  ++spent.calls;
  spent.nanoseconds += taken;
}

}  // namespace vllm_ms

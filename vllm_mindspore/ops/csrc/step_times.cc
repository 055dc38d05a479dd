#include "step_times.h"

#include <atomic>
#include <mutex>
#include <set>

#include "waiting.h"

namespace vllm_ms {
namespace {

std::atomic<bool> measuring{false};
std::mutex mutex;  // guards what follows
std::vector<StepEvent> events;

const char *lasting(const std::string &name) {
  static auto *names = new std::set<std::string>;
  return names->insert(name).first->c_str();
}

}  // namespace

void measure_steps(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (on) events.clear();
  measuring.store(on, std::memory_order_relaxed);
}

std::vector<StepEvent> step_events() {
  const std::lock_guard<std::mutex> lock(mutex);
  return events;
}

StepTimer::StepTimer(const std::string &name, int64_t columns)
    : name_(name), columns_(columns), begin_(measuring.load(std::memory_order_relaxed) ? monotonic_nanoseconds() : 0) {}

StepTimer::~StepTimer() {
  if (begin_ == 0) return;
  const int64_t end = monotonic_nanoseconds();
  const std::lock_guard<std::mutex> lock(mutex);
  if (events.size() < kMostStepEvents) events.push_back({lasting(name_), columns_, begin_, end});
}

}  // namespace vllm_ms

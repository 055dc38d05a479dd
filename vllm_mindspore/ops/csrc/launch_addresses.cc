#include "launch_addresses.h"

#include <atomic>
#include <mutex>
#include <utility>

namespace vllm_ms {
namespace {

std::atomic<bool> watching{false};
std::mutex mutex;  // guards `last`
std::vector<int64_t> last;

}  // namespace

void watch_addresses(bool on) { watching.store(on, std::memory_order_relaxed); }

bool addresses_watched() { return watching.load(std::memory_order_relaxed); }

void note_addresses(std::vector<int64_t> addresses) {
  const std::lock_guard<std::mutex> lock(mutex);
  last = std::move(addresses);
}

std::vector<int64_t> launch_addresses() {
  const std::lock_guard<std::mutex> lock(mutex);
  return last;
}

}  // namespace vllm_ms

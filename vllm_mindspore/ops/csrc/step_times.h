// When each operator of a step runs, for tests/bench/step.py and ranks.py. Nothing is measured unless it is asked for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vllm_ms {

// Begin to measure, from zero; or stop.
void measure_steps(bool on);

// One run of an operator. Times are nanoseconds of a clock that all processes of a host share.
struct StepEvent {
  const char *name;  // lives as long as the process
  int64_t columns;   // of its result
  int64_t begin, end;
};

// What ran since measuring began, in the order in which it ended; no more than kMostStepEvents.
constexpr size_t kMostStepEvents = 1 << 20;
std::vector<StepEvent> step_events();

// Its life is an operator's run.
class StepTimer {
 public:
  StepTimer(const std::string &name, int64_t columns);
  ~StepTimer();
  StepTimer(const StepTimer &) = delete;
  StepTimer &operator=(const StepTimer &) = delete;

 private:
  const std::string &name_;
  int64_t columns_, begin_;  // begin_ 0: not measured
};

}  // namespace vllm_ms

// How long each operator of a step takes, for tests/bench/step.py. Nothing is measured unless it is asked for.
#pragma once

#include <cstdint>
#include <string>

namespace vllm_ms {

// Begin to measure, from zero; or stop.
void measure_steps(bool on);

// A line for each operator and number of columns of its result: `name columns calls nanoseconds`.
std::string step_times();

// Adds the time of its life to the operator's.
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

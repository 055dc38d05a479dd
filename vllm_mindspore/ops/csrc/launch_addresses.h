// Where the tensors of a launch lie, so that tests can see that nothing was copied on its way. Off unless asked for.
#pragma once

#include <cstdint>
#include <vector>

namespace vllm_ms {

// Begin or stop to note the addresses of every launch of a sequence (wrappers/sequence.cc).
void watch_addresses(bool on);
bool addresses_watched();

void note_addresses(std::vector<int64_t> addresses);

// Of the last launch: its inputs, then its result.
std::vector<int64_t> launch_addresses();

}  // namespace vllm_ms

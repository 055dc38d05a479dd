// What the operator that begins a collective returns: the number of its round, for the one that ends it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../aot.h"

namespace vllm_ms {
namespace aot {

inline void write_round(uint32_t round, void *out) { std::memcpy(out, &round, sizeof(round)); }

inline uint32_t round_of(const Tensor &begun) {
  uint32_t round;
  std::memcpy(&round, begun.data, sizeof(round));
  return round;
}

}  // namespace aot
}  // namespace vllm_ms

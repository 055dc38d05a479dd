#pragma once

#include <cstdint>

#include "../isa.h"
#include "linear.h"
#include "quantized_weight.h"

namespace vllm_ms {

// linear.h's contract for a quantized weight: `linear.weight` is absent, `linear.n` and `linear.k` are its logical sizes.
//
// Activations are quantized too, but finely: 16 bits per value, with a scale for every 128 values of a token, so that
// products are sums of integers, exact in any order. Groups of k are added in float32 in ascending order: a row of `out`
// has the same bits whatever m is.
struct LinearQuantizedArgs {
  LinearArgs linear;
  QuantizedWeight weight;
};

VLLM_MS_DECLARE_KERNEL(linear_quantized, LinearQuantizedArgs)

}  // namespace vllm_ms

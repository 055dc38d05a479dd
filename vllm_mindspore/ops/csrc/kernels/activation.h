#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"

namespace vllm_ms {

struct Activation {
  enum Kind : int32_t { identity, relu, silu, gelu, gelu_tanh, relu2, sigmoid };
  Kind kind = identity;
  bool gated = false;  // *_and_mul: the input is [gate || up], the result act(gate) * up
};

// Reads "", "relu", "silu", "gelu", "gelu_tanh", "relu2" or "sigmoid", most also followed by "_and_mul"; false for anything else.
inline bool parse_activation(const char *text, Activation *out) {
  struct Name {
    const char *name;
    Activation activation;
  };
  static constexpr Name kNames[] = {
      {"", {Activation::identity, false}},          {"relu", {Activation::relu, false}},
      {"silu", {Activation::silu, false}},          {"gelu", {Activation::gelu, false}},
      {"gelu_tanh", {Activation::gelu_tanh, false}}, {"relu2", {Activation::relu2, false}},
      {"sigmoid", {Activation::sigmoid, false}},
      {"silu_and_mul", {Activation::silu, true}},   {"gelu_and_mul", {Activation::gelu, true}},
      {"gelu_tanh_and_mul", {Activation::gelu_tanh, true}},
  };
  for (const Name &entry : kNames) {
    if (std::strcmp(entry.name, text) != 0) continue;
    *out = entry.activation;
    return true;
  }
  return false;
}

// out[r, :] = act(x[r, :width]), or act(x[r, :width]) * x[r, width:] when gated; x has 2 * width columns then.
struct ActivationArgs {
  const float *x;
  float *out;
  int64_t rows, width;
  Activation activation;
};

VLLM_MS_DECLARE_KERNEL(activate_rows, ActivationArgs)

}  // namespace vllm_ms

// What Python asks the library through ctypes.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>

#include "coded.h"
#include "columns.h"
#include "isa.h"
#include "kernels/quantized_weight.h"
#include "kernels/sample.h"
#include "launch_addresses.h"
#include "parallel.h"
#include "step_times.h"

#define VLLM_MS_EXPORT extern "C" __attribute__((visibility("default")))

// Writes the name of the instruction-set variant in use and returns 0, or writes what is wrong and returns 1.
VLLM_MS_EXPORT int vllm_ms_cpu_isa(char *text, int size) {
  try {
    std::snprintf(text, size, "%s", vllm_ms::isa_name(vllm_ms::isa()));
    return 0;
  } catch (const std::exception &error) {
    std::snprintf(text, size, "%s", error.what());
    return 1;
  }
}

VLLM_MS_EXPORT int vllm_ms_num_threads() { return vllm_ms::num_threads(); }

// See columns.h.
VLLM_MS_EXPORT int vllm_ms_columns_supported() { return vllm_ms::columns_supported(); }
VLLM_MS_EXPORT void vllm_ms_arrange_columns(void *weight, int64_t matrices, int64_t n, int64_t k, int64_t back) {
  vllm_ms::arrange_columns(static_cast<vllm_ms::bf16 *>(weight), matrices, n, k, back != 0);
}

// See coded.h.
VLLM_MS_EXPORT int vllm_ms_encode_columns(void *weight, int64_t matrices, int64_t n, int64_t k) {
  return vllm_ms::encode_columns(static_cast<vllm_ms::bf16_columns *>(weight), matrices, n, k);
}
VLLM_MS_EXPORT void vllm_ms_decode_columns(void *weight, int64_t matrices, int64_t n, int64_t k) {
  vllm_ms::decode_columns(static_cast<vllm_ms::bf16_columns *>(weight), matrices, n, k);
}

// kernels/quantized_weight.h's quantize_weight; dtype: 0 float32, 1 bfloat16, 2 float16.
VLLM_MS_EXPORT void vllm_ms_quantize_weight(const void *weight, int dtype, int64_t n, int64_t k, int bits,
                                            uint8_t *values, float *scales) {
  vllm_ms::quantize_weight({{weight, static_cast<vllm_ms::DType>(dtype)}, n, k, bits, values, scales});
}

// out[r] = argmax of row r; see kernels/sample.h.
VLLM_MS_EXPORT void vllm_ms_argmax_rows(const float *logits, int64_t rows, int64_t vocab, int64_t stride,
                                        int64_t *out) {
  vllm_ms::argmax_rows({{logits, rows, vocab, stride}, out});
}

// out[r] = a token drawn from row r; see kernels/sample.h.
VLLM_MS_EXPORT void vllm_ms_sample_rows(const float *logits, int64_t rows, int64_t vocab, int64_t stride,
                                        const int32_t *top_k, const float *top_p, const double *uniform,
                                        int64_t *out) {
  vllm_ms::sample_rows({{logits, rows, vocab, stride}, top_k, top_p, uniform, out});
}

// See step_times.h: begin (1) or stop (0) to measure, and read what was measured.
VLLM_MS_EXPORT void vllm_ms_measure_steps(int on) { vllm_ms::measure_steps(on != 0); }
VLLM_MS_EXPORT void vllm_ms_step_times(char *text, int size) {
  std::snprintf(text, size, "%s", vllm_ms::step_times().c_str());
}

// See parallel.h.
VLLM_MS_EXPORT int64_t vllm_ms_scratch_allocations() { return vllm_ms::scratch_allocations(); }

// See launch_addresses.h: begin (1) or stop (0) to note them, and read the last ones; returns how many there are.
VLLM_MS_EXPORT void vllm_ms_watch_addresses(int on) { vllm_ms::watch_addresses(on != 0); }
VLLM_MS_EXPORT int vllm_ms_launch_addresses(int64_t *out, int size) {
  const std::vector<int64_t> found = vllm_ms::launch_addresses();
  std::copy_n(found.begin(), std::min<size_t>(size, found.size()), out);
  return static_cast<int>(found.size());
}

// What Python asks the library through ctypes.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>

#include "coded.h"
#include "collectives.h"
#include "columns.h"
#include "exchange.h"
#include "isa.h"
#include "kernels/quantized_weight.h"
#include "kernels/sample.h"
#include "launch_addresses.h"
#include "parallel.h"
#include "step_times.h"

#define VLLM_MS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Runs f; returns 0, or writes what it threw and returns 1.
template <class F>
int reported(char *text, int size, F f) {
  try {
    f();
    return 0;
  } catch (const std::exception &error) {
    std::snprintf(text, size, "%s", error.what());
    return 1;
  }
}

}  // namespace

// Writes the name of the instruction-set variant in use and returns 0, or writes what is wrong and returns 1.
VLLM_MS_EXPORT int vllm_ms_cpu_isa(char *text, int size) {
  return reported(text, size, [&] { std::snprintf(text, size, "%s", vllm_ms::isa_name(vllm_ms::isa())); });
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

// See step_times.h: begin (1) or stop (0) to measure, and read what was measured; returns how many events there are.
VLLM_MS_EXPORT void vllm_ms_measure_steps(int on) { vllm_ms::measure_steps(on != 0); }
VLLM_MS_EXPORT int64_t vllm_ms_step_events(vllm_ms::StepEvent *out, int64_t size) {
  const std::vector<vllm_ms::StepEvent> found = vllm_ms::step_events();
  std::copy_n(found.begin(), std::min<size_t>(size, found.size()), out);
  return found.size();
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

// See collectives.h. Joins or makes a group; returns the descriptor of its memory, or writes what is wrong and returns -1.
VLLM_MS_EXPORT int vllm_ms_join_group(const char *name, int rank, int size, const char *memory, int64_t slot_bytes,
                                      double timeout, int64_t spin_nanoseconds, int one_way, char *text,
                                      int text_size) {
  int file = -1;
  reported(text, text_size, [&] {
    file = vllm_ms::join_group({name, rank, size, memory, slot_bytes, timeout, spin_nanoseconds, one_way != 0}).file();
  });
  return file;
}
// See links.h: connections of a group that is joined with ranks of other hosts, by the libzmq that `library` is linked
// with. Listen first; give the endpoints to the others; connect with each; then wait for all. Return 0, or write what
// is wrong and return 1.
VLLM_MS_EXPORT int vllm_ms_listen(const char *name, const char *library, const char *token, const char *address,
                                  const int32_t *others, int count, double silence, char *text, int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::load_zmq(library);
    vllm_ms::Group &group = vllm_ms::group(name);
    const vllm_ms::LinkOptions options{name, token, group.rank(), group.size(), vllm_ms::Rounds::kDepth, silence};
    group.use(std::make_unique<vllm_ms::Links>(options, address, std::vector<int>(others, others + count)));
  });
}
VLLM_MS_EXPORT int vllm_ms_endpoint(const char *name, int other, char *endpoint, int size, char *text, int text_size) {
  return reported(text, text_size, [&] {
    std::snprintf(endpoint, size, "%s", vllm_ms::group(name).links().endpoint(other).c_str());
  });
}
VLLM_MS_EXPORT int vllm_ms_connect(const char *name, int other, const char *process, const char *host,
                                   const char *endpoint, char *text, int text_size) {
  return reported(text, text_size,
                  [&] { vllm_ms::group(name).links().connect(other, process, host, endpoint); });
}
VLLM_MS_EXPORT int vllm_ms_greet(const char *name, double seconds, char *text, int text_size) {
  return reported(text, text_size, [&] { vllm_ms::group(name).links().greet(seconds); });
}
VLLM_MS_EXPORT void vllm_ms_flush_groups(double seconds) { vllm_ms::flush_groups(seconds); }
VLLM_MS_EXPORT void vllm_ms_lost_rank(char *text, int size) {
  std::snprintf(text, size, "%s", vllm_ms::lost_rank().c_str());
}
VLLM_MS_EXPORT void vllm_ms_leave_group(const char *name) { vllm_ms::leave_group(name); }
VLLM_MS_EXPORT void vllm_ms_set_group_timeout(double seconds) { vllm_ms::set_group_timeout(seconds); }
VLLM_MS_EXPORT void vllm_ms_fail_groups(const char *reason) { vllm_ms::fail_groups(reason); }
VLLM_MS_EXPORT void vllm_ms_group_failure(char *text, int size) {
  std::snprintf(text, size, "%s", vllm_ms::group_failure().c_str());
}

// Collectives of tensors outside of a graph; dtype as for vllm_ms_quantize_weight. Return 0, or write what is wrong and
// return 1.
VLLM_MS_EXPORT int vllm_ms_all_reduce(const char *name, const void *x, int64_t count, int dtype, void *out, char *text,
                                      int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::group(name).all_reduce(x, count, static_cast<vllm_ms::DType>(dtype), out);
  });
}
VLLM_MS_EXPORT int vllm_ms_all_gather(const char *name, const void *x, int64_t outer, int64_t inner, int dtype,
                                      void *out, char *text, int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::group(name).all_gather(x, outer, inner, static_cast<vllm_ms::DType>(dtype), out);
  });
}
VLLM_MS_EXPORT int vllm_ms_reduce_scatter(const char *name, const void *x, int64_t outer, int64_t inner, int dtype,
                                          void *out, char *text, int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::group(name).reduce_scatter(x, outer, inner, static_cast<vllm_ms::DType>(dtype), out);
  });
}

// Exchanges outside of a graph, begun and ended at once; see exchange.h for the arguments. One column of ranks.
VLLM_MS_EXPORT int vllm_ms_dispatch(const char *name, const int32_t *token_ranks, int64_t total, int64_t capacity,
                                    const float *routing, int64_t top_k, const float *x, int64_t width, float *out,
                                    char *text, int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::Group &group = vllm_ms::group(name);
    const vllm_ms::StepTokens tokens(token_ranks, total, group.size());
    const uint32_t round = vllm_ms::begin_dispatch(group, tokens, x, width);
    vllm_ms::end_dispatch(group, round, tokens, {capacity, 1, 0}, routing, top_k, x, width, out);
  });
}
VLLM_MS_EXPORT int vllm_ms_combine(const char *name, const int32_t *token_ranks, int64_t total, int64_t capacity,
                                   const float *routing, int64_t top_k, const float *y, int64_t width, float *out,
                                   char *text, int text_size) {
  return reported(text, text_size, [&] {
    vllm_ms::Group &group = vllm_ms::group(name);
    const vllm_ms::StepTokens tokens(token_ranks, total, group.size());
    const vllm_ms::ExpertHolders holders{capacity, 1, 0};
    const uint32_t round = vllm_ms::begin_combine(group, tokens, holders, routing, top_k, y, width);
    vllm_ms::end_combine(group, round, tokens, holders, routing, top_k, y, width, out);
  });
}

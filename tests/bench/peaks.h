// What this machine can do at best, in plain loops compiled for it (-march=native): the measure for the kernels.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

inline volatile int64_t sink;

// Reads bytes [begin, end) of `memory`, a multiple of 512 of them.
inline void read_memory(const char *memory, int64_t begin, int64_t end) {
  typedef int64_t Wide __attribute__((vector_size(64)));
  Wide sums[8] = {};
  for (int64_t i = begin; i < end; i += 512) {
    __builtin_prefetch(memory + i + 4096);
    for (int j = 0; j < 8; ++j) sums[j] ^= *reinterpret_cast<const Wide *>(memory + i + 64 * j);
  }
  int64_t total = 0;
  for (const Wide &sum : sums) total ^= sum[0] ^ sum[7];
  sink = total;
}

constexpr int64_t kProductRounds = 1 << 18;

// Returns the operations (two a multiply-add) that it did.
#if defined(__AMX_BF16__)
constexpr const char *kProducts = "AMX bf16";
inline double multiply_bf16() {
  syscall(SYS_arch_prctl, 0x1023, 18);
  alignas(64) static char config[64];
  alignas(64) static char zeros[1024];
  config[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  asm volatile("" ::: "memory");
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < kProductRounds; ++i) {
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return kProductRounds * 4.0 * 2 * 16 * 16 * 32;
}
#elif defined(__AVX512BF16__)
constexpr const char *kProducts = "bf16 dot products";
inline double multiply_bf16() {
  __m512 sums[8];
  for (int j = 0; j < 8; ++j) sums[j] = _mm512_set1_ps(j);  // others each, else the compiler makes them one
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
  for (int64_t i = 0; i < kProductRounds; ++i) {
    for (int j = 0; j < 8; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, a);
    asm volatile("" : "+v"(a));
  }
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < 8; ++j) total += sums[j];
  sink = static_cast<int64_t>(_mm512_reduce_add_ps(total));
  return kProductRounds * 8.0 * 2 * 32;
}
#else
constexpr const char *kProducts = "float32 multiply-add";
__attribute__((optimize("fp-contract=fast"))) inline double multiply_bf16() {  // the kernels' flags keep * and + apart
#if defined(__AVX512F__)
  constexpr int kWidth = 16;
#elif defined(__AVX2__)
  constexpr int kWidth = 8;
#else
  constexpr int kWidth = 4;
#endif
  typedef float Vec __attribute__((vector_size(4 * kWidth)));
  Vec sums[10], a = Vec{} + 0.5f, b = Vec{} + 1e-9f;
  for (int j = 0; j < 10; ++j) sums[j] = Vec{} + 1.0f * j;  // others each, else the compiler makes them one
  for (int64_t i = 0; i < kProductRounds; ++i) {
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) sums[j] = sums[j] * a + b;
  }
  float total = 0;
  for (int j = 0; j < 10; ++j) total += sums[j][0];
  sink = static_cast<int64_t>(total);
  return kProductRounds * 10.0 * 2 * kWidth;
}
#endif

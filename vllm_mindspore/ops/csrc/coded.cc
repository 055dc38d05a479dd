#include "coded.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>

#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int kCodes = 16;
constexpr int64_t kRarity = 1024;  // elements for an exception; with more, taking them out is no longer cheap

uint8_t upper_byte(uint16_t bits) { return static_cast<uint8_t>(bits >> 8); }

// The upper bytes that most elements of a group have, and how many elements have another one.
struct Codebook {
  std::array<uint8_t, kCodes> bytes;
  int64_t exceptions = 0;

  Codebook(const bf16_columns *group, int64_t elements) {
    std::array<std::array<int64_t, 256>, 2> counts{};  // two, since neighbours often have the same
    for (int64_t i = 0; i + 1 < elements; i += 2) {
      ++counts[0][upper_byte(group[i].bits)];
      ++counts[1][upper_byte(group[i + 1].bits)];
    }
    std::array<int, 256> order;
    std::iota(order.begin(), order.end(), 0);
    const auto count = [&](int value) { return counts[0][value] + counts[1][value]; };
    std::partial_sort(order.begin(), order.begin() + kCodes, order.end(), [&](int a, int b) {
      return count(a) != count(b) ? count(a) > count(b) : a > b;
    });
    std::copy_n(order.begin(), kCodes, bytes.begin());
    for (int i = kCodes; i < 256; ++i) exceptions += count(order[i]);
  }
};

// Exceptions that have a place in a group's memory, without the last.
int64_t capacity(int64_t k) {
  return (2 * kColumnGroup * k - coded_bytes(k)) / static_cast<int64_t>(sizeof(CodedException));
}

void encode_group(bf16_columns *group, int64_t k, bf16_columns *copy) {
  const Codebook book(group, kColumnGroup * k);
  std::copy_n(group, kColumnGroup * k, copy);
  constexpr uint8_t kNone = 255;
  std::array<uint8_t, 256> code_of;
  code_of.fill(kNone);
  for (int code = 0; code < kCodes; ++code) code_of[book.bytes[code]] = static_cast<uint8_t>(code);
  const CodedGroup places(group, k);
  const auto lower = const_cast<uint8_t *>(places.lower), codes = const_cast<uint8_t *>(places.codes);
  const auto upper = const_cast<uint8_t *>(places.upper);
  auto next = const_cast<CodedException *>(places.exceptions);
  for (int i = 0; i < kUpperBytes; ++i) upper[i] = book.bytes[i % kCodes];
  std::fill_n(codes, kColumnGroup * k / 2, uint8_t{0});
  for (int64_t i = 0; i < kColumnGroup * k; ++i) {
    const uint16_t bits = copy[i].bits;
    const int64_t pair = i / kPairElements, place = i % kPairElements;
    lower[CodedGroup::lower_at(pair, place)] = static_cast<uint8_t>(bits);
    uint8_t code = code_of[upper_byte(bits)];
    if (code == kNone) {
      code = 0;
      *next++ = {static_cast<uint32_t>(2 * pair), static_cast<uint16_t>(place), bits};
    }
    uint8_t &both = codes[CodedGroup::code_at(pair, place)];
    both = static_cast<uint8_t>(both | code << CodedGroup::code_shift(pair));
  }
  *next = {CodedException::kNoMore, 0, 0};
}

void decode_group(bf16_columns *group, int64_t k, bf16_columns *copy) {
  std::copy_n(group, kColumnGroup * k, copy);
  const CodedGroup coded(copy, k);
  for (int64_t i = 0; i < kColumnGroup * k; ++i) {
    group[i].bits = coded.bits(i / kPairElements * 2, i % kPairElements);
  }
  for (const CodedException *one = coded.exceptions; one->k != CodedException::kNoMore; ++one) {
    group[one->k * kColumnGroup + one->place].bits = one->bits;
  }
}

// Calls f(group, a copy's memory) for all groups.
template <class F>
void for_groups(bf16_columns *weight, int64_t groups, int64_t k, F f) {
  parallel_for(groups, 1, [=](int64_t begin, int64_t end) {
    const Scratch copy(kColumnGroup * k * sizeof(bf16_columns));
    for (int64_t i = begin; i < end; ++i) f(weight + i * kColumnGroup * k, copy.as<bf16_columns>());
  });
}

}  // namespace

bool encode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k) {
  if (n % kColumnGroup != 0 || k % kOctet != 0 || k > INT32_MAX || capacity(k) < 1) return false;
  const int64_t groups = matrices * n / kColumnGroup;
  std::atomic<int64_t> exceptions{0};
  std::atomic<bool> fits{true};
  for_groups(weight, groups, k, [&](bf16_columns *group, bf16_columns *) {
    if (!fits.load(std::memory_order_relaxed)) return;
    const int64_t found = Codebook(group, kColumnGroup * k).exceptions;
    if (found > capacity(k)) fits = false;
    exceptions += found;
  });
  if (!fits || exceptions > matrices * n * k / kRarity) return false;
  for_groups(weight, groups, k, [=](bf16_columns *group, bf16_columns *copy) { encode_group(group, k, copy); });
  return true;
}

void decode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k) {
  for_groups(weight, matrices * n / kColumnGroup, k,
             [=](bf16_columns *group, bf16_columns *copy) { decode_group(group, k, copy); });
}

}  // namespace vllm_ms

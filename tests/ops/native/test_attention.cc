// Attention, rotary and the KV cache without MindSpore: against float64, and bit for bit across threads and chunks.
#include <algorithm>
#include <stdexcept>

#include "attention_plan.h"
#include "testing.h"

using namespace vllm_ms;
using testing::Random;
using testing::Stored;

namespace {

struct Request {
  int queries, length;
};

struct Options {
  int64_t num_heads = 4, num_kv_heads = 2, head_size = 64, value_size = 64, block_size = 16, window = 0;
  float soft_cap = 0;
  bool sinks = false, alibi = false;
  DType dtype = DType::f32;

  int64_t row_size() const { return head_size + value_size; }
};

float as_bf16(float value) {
  bf16 rounded;
  from_float(value, &rounded);
  return to_float(rounded);
}

// A step with a random cache whose blocks are in random order.
struct Step {
  Options o;
  std::vector<Request> requests;
  std::vector<int32_t> table, starts, lengths;
  int64_t max_blocks = 1, num_slots = 0, num_tokens = 0;
  std::vector<float> query;
  Stored cache, sinks, slopes;

  Step(Random &random, const Options &options, const std::vector<Request> &all)
      : o(options),
        requests(all),
        cache(fill(random), options.dtype),
        sinks(random.normals(options.num_heads), DType::bf16),
        slopes(slopes_of(options.num_heads), DType::fp16) {
    query = random.normals(num_tokens * o.num_heads * o.head_size);
  }

  static std::vector<float> slopes_of(int64_t heads) {
    std::vector<float> slopes;
    for (int64_t h = 0; h < heads; ++h) slopes.push_back(std::exp2(-static_cast<float>(h % 8) - 1));
    return slopes;
  }

  std::vector<float> fill(Random &random) {
    int64_t blocks = 2;
    starts.push_back(0);
    for (const Request &r : requests) {
      const int64_t need = (r.length + o.block_size - 1) / o.block_size;
      blocks += need;
      max_blocks = std::max(max_blocks, need);
      num_tokens += r.queries;
      starts.push_back(num_tokens);
      lengths.push_back(r.length);
    }
    std::vector<int32_t> order(blocks);
    for (int64_t i = 0; i < blocks; ++i) order[i] = i;
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    table.assign(requests.size() * max_blocks, 0);
    for (size_t r = 0, used = 0; r < requests.size(); ++r) {
      for (int64_t i = 0; i * o.block_size < requests[r].length; ++i) table[r * max_blocks + i] = order[used++];
    }
    num_slots = blocks * o.block_size;
    return random.normals(num_slots * o.num_kv_heads * o.row_size());
  }

  int64_t slot(int64_t request, int64_t position) const {
    return table[request * max_blocks + position / o.block_size] * o.block_size + position % o.block_size;
  }

  AttentionInputs inputs(std::vector<float> &out) {
    out.assign(num_tokens * o.num_heads * o.value_size, NAN);
    AttentionInputs in;
    in.query = query.data();
    in.query_stride = o.num_heads * o.head_size;
    in.num_tokens = num_tokens;
    in.cache = {cache.data(), o.dtype, num_slots, o.num_kv_heads, o.head_size, o.value_size};
    in.block_table = table.data();
    in.num_requests = requests.size();
    in.max_blocks = max_blocks;
    in.query_start_loc = starts.data();
    in.seq_lens = lengths.data();
    if (o.sinks) in.sinks = sinks.weight();
    if (o.alibi) in.alibi_slopes = slopes.weight();
    in.num_heads = o.num_heads;
    in.block_size = o.block_size;
    in.sliding_window = o.window;
    in.scale = 0.13f;
    in.soft_cap = o.soft_cap;
    in.out = out.data();
    return in;
  }

  std::vector<float> run() {
    std::vector<float> out;
    const AttentionInputs in = inputs(out);
    check_attention(in);
    attention(in);
    return out;
  }

  double logit(int64_t request, int64_t token, int64_t head, int64_t position, int64_t key, bool rounded) const {
    const int64_t kv_head = head / (o.num_heads / o.num_kv_heads);
    const int64_t row = (slot(request, key) * o.num_kv_heads + kv_head) * o.row_size();
    double dot = 0;
    const float *q = query.data() + (token * o.num_heads + head) * o.head_size;
    for (int64_t d = 0; d < o.head_size; ++d) dot += (rounded ? as_bf16(q[d]) : q[d]) * cache[row + d];
    dot *= static_cast<double>(0.13f);
    if (o.soft_cap > 0) dot = o.soft_cap * std::tanh(dot / o.soft_cap);
    if (o.alibi) dot += slopes[head] * static_cast<double>(key - position);
    return dot;
  }

  // rounded: queries are rounded to bf16.
  std::vector<double> reference(bool rounded) const {
    std::vector<double> out(num_tokens * o.num_heads * o.value_size, 0.0);
    for (size_t r = 0; r < requests.size(); ++r) {
      for (int64_t i = 0; i < requests[r].queries; ++i) {
        const int64_t token = starts[r] + i, position = requests[r].length - requests[r].queries + i;
        const int64_t first = o.window > 0 ? std::max<int64_t>(0, position - o.window + 1) : 0;
        for (int64_t h = 0; h < o.num_heads; ++h) {
          std::vector<double> logits;
          for (int64_t k = first; k <= position; ++k) logits.push_back(logit(r, token, h, position, k, rounded));
          double top = *std::max_element(logits.begin(), logits.end());
          if (o.sinks) top = std::max(top, sinks[h]);
          double sum = o.sinks ? std::exp(sinks[h] - top) : 0;
          for (double &x : logits) sum += x = std::exp(x - top);
          const int64_t kv_head = h / (o.num_heads / o.num_kv_heads);
          for (int64_t k = first; k <= position; ++k) {
            const int64_t value = (slot(r, k) * o.num_kv_heads + kv_head) * o.row_size() + o.head_size;
            for (int64_t d = 0; d < o.value_size; ++d) {
              out[(token * o.num_heads + h) * o.value_size + d] += logits[k - first] / sum * cache[value + d];
            }
          }
        }
      }
    }
    return out;
  }
};

std::string describe(const Options &o) {
  std::ostringstream text;
  text << testing::dtype_name(o.dtype) << " heads " << o.num_heads << "/" << o.num_kv_heads << " size " << o.head_size
       << "+" << o.value_size << " block " << o.block_size << " window " << o.window << " cap " << o.soft_cap
       << (o.sinks ? " sinks" : "") << (o.alibi ? " alibi" : "");
  return text.str();
}

bool in_products(const Options &o) {
  return o.dtype == DType::bf16 && o.head_size % 32 == 0 && o.value_size % 32 == 0;
}

// In bf16 products weights have 16 bits on AMX tiles, and 8 in AVX-512; queries too, which the reference knows.
double tolerance(const Options &o) {
  if (!in_products(o)) return 2e-6;
  return isa() == Isa::amx ? 4e-5 : isa() == Isa::avx512 ? 4e-3 : 2e-6;
}

Options random_options(Random &random) {
  constexpr int64_t kSizes[] = {64, 80, 96, 112, 128, 256, 20, 33, 1, 16};
  constexpr int64_t kHeads[][2] = {{4, 4}, {8, 2}, {7, 1}, {6, 2}, {3, 3}, {5, 1}};
  constexpr int64_t kBlocks[] = {16, 32, 1, 7, 128};
  constexpr int64_t kWindows[] = {0, 0, 1, 17, 64, 300};
  Options o;
  const auto &heads = kHeads[random.below(6)];
  o.num_heads = heads[0];
  o.num_kv_heads = heads[1];
  o.head_size = kSizes[random.below(10)];
  const int64_t narrower = kSizes[random.below(10)];
  o.value_size = random.below(2) == 1 ? std::min(narrower, o.head_size) : o.head_size;
  o.block_size = kBlocks[random.below(5)];
  o.window = kWindows[random.below(6)];
  o.soft_cap = random.below(2) * 5.0f;
  o.sinks = random.below(2) == 1;
  o.alibi = random.below(2) == 1;
  o.dtype = testing::kFloatTypes[random.below(3)];
  return o;
}

bool equal(const std::vector<float> &a, const std::vector<float> &b) {
  return a.size() == b.size() && testing::same_bits(a.data(), b.data(), a.size());
}

}  // namespace

TEST(attention_equals_float64) {
  Random random(1);
  for (int i = 0; i < 24; ++i) {
    const Options o = random_options(random);
    const int length = 1 + random.below(700);
    Step step(random, o, {{3, 3}, {1, length}, {0, 5}, {static_cast<int>(1 + random.below(20)), length + 20}});
    const std::vector<double> exact = step.reference(false), rounded = in_products(o) ? step.reference(true) : exact;
    testing::for_each_isa([&] {
      const double error = testing::max_error(step.run(), isa() == Isa::avx512 ? rounded : exact);
      CHECK(error < tolerance(o)) << describe(o) << " length " << length << ": error " << error;
    });
  }
}

TEST(attention_bits_do_not_depend_on_threads_or_chunks) {
  Random random(2);
  const int threads = num_threads();
  for (int i = 0; i < 6; ++i) {
    const Options o = random_options(random);
    Step whole(random, o, {{90, 1100}, {1, 2000}, {7, 7}});
    testing::for_each_isa([&] {
      set_num_threads(1);
      const std::vector<float> alone = whole.run();
      for (int n : {2, 7}) {
        set_num_threads(n);
        CHECK(equal(whole.run(), alone)) << describe(o) << ", " << n << " threads";
      }
      const int64_t width = o.num_heads * o.head_size, result = o.num_heads * o.value_size;
      for (int begin = 0; begin < 90; begin += 37) {
        const int end = std::min(90, begin + 37);
        Step part = whole;
        part.requests = {{end - begin, 1010 + end}};
        part.num_tokens = end - begin;
        part.starts = {0, end - begin};
        part.lengths = {1010 + end};
        part.query.assign(whole.query.begin() + begin * width, whole.query.begin() + end * width);
        CHECK(testing::same_bits(part.run().data(), alone.data() + begin * result, (end - begin) * result))
            << describe(o) << ", queries " << begin << " to " << end;
      }
    });
  }
  set_num_threads(threads);
}

TEST(attention_ignores_unseen_slots) {
  Random random(3);
  Options o;
  o.window = 20;
  Step step(random, o, {{40, 90}, {1, 33}});
  testing::for_each_isa([&] {
    const std::vector<float> clean = step.run();
    Step dirty = step;
    std::vector<bool> seen(step.num_slots, false);
    for (int p = 31; p < 90; ++p) seen[step.slot(0, p)] = true;
    for (int p = 13; p < 33; ++p) seen[step.slot(1, p)] = true;
    const int64_t row = o.num_kv_heads * o.row_size();
    for (int64_t s = 0; s < step.num_slots; ++s) {
      if (!seen[s]) std::fill_n(static_cast<float *>(dirty.cache.data()) + s * row, row, NAN);
    }
    CHECK(equal(dirty.run(), clean));
  });
}

TEST(attention_rejects_what_is_out_of_range) {
  Random random(4);
  const auto message = [&](const std::function<void(Step &)> &change) {
    Step step(random, Options{}, {{2, 40}, {2, 60}});
    change(step);
    std::vector<float> out;
    try {
      check_attention(step.inputs(out));
    } catch (const std::invalid_argument &error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(message([](Step &) {}).empty());
  CHECK(message([](Step &s) { s.table[s.max_blocks] = 9; }).find("block 9") != std::string::npos);
  CHECK(message([](Step &s) { s.table[1] = -1; }).find("block -1") != std::string::npos);
  CHECK(message([](Step &s) { s.lengths[1] = 65; }).find("seq_lens 65") != std::string::npos);
  CHECK(message([](Step &s) { s.lengths[0] = 1; }).find("seq_lens 1 ") != std::string::npos);
  CHECK(message([](Step &s) { s.starts[2] = 5; }).find("2..5") != std::string::npos);
}

TEST(kv_write_and_rotary_equal_float64) {
  Random random(5);
  constexpr int64_t kTokens = 150, kHeads = 3, kSlots = 200;
  for (DType dtype : testing::kFloatTypes) {
    for (int64_t size : {64, 33, 20}) {
      const int64_t rotated = size / 4 * 2, width = kHeads * size;
      const std::vector<float> key = random.normals(kTokens * width), value = random.normals(kTokens * width);
      const Stored table(random.normals(50 * rotated), DType::bf16), weight(random.normals(size), DType::fp16);
      std::vector<int64_t> positions(kTokens), slots(kTokens);
      for (int64_t t = 0; t < kTokens; ++t) {
        positions[t] = random.below(50);
        slots[t] = t % 5 == 0 ? -1 : t % 7 == 0 ? kSlots + t : kSlots - 1 - t;
      }
      for (bool neox : {true, false}) {
        HeadTransform transform;
        transform.head_size = size;
        transform.norm = HeadNorm::head;
        transform.norm_weight = weight.weight();
        transform.norm_eps = 1e-6f;
        transform.norm_offset = 1;
        transform.positions = positions.data();
        transform.cos_sin = table.weight();
        transform.rotary_dim = rotated;
        transform.neox = neox;
        std::vector<double> expected(kSlots * width * 2, 0.0);
        for (int64_t t = 0; t < kTokens; ++t) {
          if (slots[t] < 0 || slots[t] >= kSlots) continue;
          for (int64_t h = 0; h < kHeads; ++h) {
            const float *x = key.data() + t * width + h * size;
            double *out = expected.data() + (slots[t] * kHeads + h) * 2 * size;
            double squares = 0;
            for (int64_t d = 0; d < size; ++d) squares += double{x[d]} * x[d];
            for (int64_t d = 0; d < size; ++d) out[d] = x[d] / std::sqrt(squares / size + 1e-6) * (weight[d] + 1);
            for (int64_t i = 0; i < rotated / 2; ++i) {
              double &a = out[neox ? i : 2 * i], &b = out[neox ? i + rotated / 2 : 2 * i + 1];
              const double c = table[positions[t] * rotated + i], s = table[positions[t] * rotated + rotated / 2 + i];
              const double turned = a * c - b * s;
              b = b * c + a * s;
              a = turned;
            }
            for (int64_t d = 0; d < size; ++d) out[size + d] = value[t * width + h * size + d];
          }
        }
        testing::for_each_isa([&] {
          Stored cache(std::vector<float>(kSlots * width * 2, 0.0f), dtype);
          kv_write({{cache.data(), dtype, kSlots, kHeads, size, size}, key.data(), width, value.data(), width,
                    slots.data(), &transform, nullptr, 0, kTokens});
          std::vector<float> written(expected.size());
          VLLM_MS_DISPATCH_FLOAT(dtype, T, {
            for (size_t i = 0; i < written.size(); ++i) written[i] = to_float(static_cast<const T *>(cache.data())[i]);
          })
          const double bound = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::fp16 ? 0x1p-11 : 2e-6;
          const double error = testing::max_error(written, expected);
          CHECK(error < bound) << testing::dtype_name(dtype) << " head_size " << size << ": error " << error;

          std::vector<float> transformed(key.size());
          rotary({transform, key.data(), width, transformed.data(), width, kHeads, 0, kTokens});
          for (int64_t t = 0; t < kTokens && dtype == DType::f32; ++t) {
            if (slots[t] < 0 || slots[t] >= kSlots) continue;
            for (int64_t h = 0; h < kHeads; ++h) {
              CHECK(testing::same_bits(&transformed[t * width + h * size], &written[(slots[t] * kHeads + h) * 2 * size],
                                       size));
            }
          }
        });
      }
    }
  }
}

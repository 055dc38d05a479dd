#include "mla_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "mla_forms.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kElementsPerChunk = 1 << 14;

void fail(const std::string &message) { throw std::invalid_argument(message); }

int64_t queries_of(const MlaInputs &in, int64_t request) {
  return in.step.query_start_loc[request + 1] - in.step.query_start_loc[request];
}

void clear_unowned(const AttentionInputs &step, int64_t width) {
  const int64_t first = step.num_requests > 0 ? step.query_start_loc[0] : 0;
  const int64_t last = step.num_requests > 0 ? step.query_start_loc[step.num_requests] : 0;
  if (first > 0) std::memset(step.out, 0, first * width * sizeof(float));
  if (last < step.num_tokens) {
    std::memset(step.out + last * width, 0, (step.num_tokens - last) * width * sizeof(float));
  }
}

// How many of a request's queries attend to selected positions: the last ones, for these have the most keys.
int64_t selecting_queries(const MlaInputs &in, int64_t queries, int64_t keys) {
  return in.selected == nullptr ? 0 : std::clamp<int64_t>(keys - in.top_k, 0, queries);
}

// Of tokens that attend to selected positions: those are among their keys.
void check_selected(const MlaInputs &in) {
  if (in.top_k <= 0) fail("selected: " + std::to_string(in.top_k) + " positions a token");
  for (int64_t request = 0; request < in.step.num_requests; ++request) {
    const int64_t end = in.step.query_start_loc[request + 1], keys = in.step.seq_lens[request];
    for (int64_t token = end - selecting_queries(in, queries_of(in, request), keys); token < end; ++token) {
      const int64_t last = keys - (end - token);
      const float *row = in.selected + token * in.top_k, limit = static_cast<float>(last);
      bool all = true;
      for (int64_t i = 0; i < in.top_k; ++i) all &= row[i] >= 0.0f && row[i] <= limit;
      if (!all) {
        fail("selected: not all positions of token " + std::to_string(token) + " are in 0.." + std::to_string(last));
      }
    }
  }
}

// Multiplications of each head.
int64_t absorbed_cost(const MlaInputs &in, int64_t queries, int64_t pairs) {
  return queries * (in.nope + in.v) * in.lora + pairs * (2 * in.lora + in.rope);
}
int64_t expanded_cost(const MlaInputs &in, int64_t keys, int64_t pairs) {
  return keys * (in.nope + in.v) * in.lora + pairs * (in.nope + in.rope + in.v);
}

// A bit for each key that a request's queries attend to; what they do not see is not looked at.
std::vector<uint64_t> mask_of(const MlaInputs &in, int64_t request) {
  static_assert(kTileKeys == 64, "a word is a tile");
  const int64_t queries = queries_of(in, request), keys = in.step.seq_lens[request], tiles = mla_tiles(keys);
  const int64_t seeing_all = queries - selecting_queries(in, queries, keys);
  std::vector<uint64_t> mask(queries * tiles);
  std::fill(mask.begin(), mask.begin() + seeing_all * tiles, ~uint64_t{0});
  parallel_for(queries - seeing_all, 1 + kElementsPerChunk / in.top_k, [&](int64_t begin, int64_t end) {
    for (int64_t i = seeing_all + begin; i < seeing_all + end; ++i) {
      const float *row = in.selected + (in.step.query_start_loc[request] + i) * in.top_k;
      uint64_t *words = mask.data() + i * tiles;
      for (int64_t j = 0; j < in.top_k; ++j) {
        const uint32_t position = static_cast<uint32_t>(row[j]);
        words[position / kTileKeys] |= uint64_t{1} << position % kTileKeys;
      }
    }
  });
  return mask;
}

// Gathers queries and requests by the form they take, and runs them.
class Forms {
 public:
  explicit Forms(const MlaInputs &in) : in_(in) {}

  void add(int64_t request) {
    const int64_t queries = queries_of(in_, request), keys = in_.step.seq_lens[request];
    if (mla_masks(in_, queries, keys)) {
      masks_.push_back(mask_of(in_, request));
      expanded_.push_back({request, queries, keys, masks_.back().data()});
      return;
    }
    const int64_t token = in_.step.query_start_loc[request];
    const int64_t first = queries - selecting_queries(in_, queries, keys), context = keys - queries;
    if (first > 0 && mla_expands(in_, first, context + first)) {
      expanded_.push_back({request, first, context + first, nullptr});
    } else {
      for (int64_t i = 0; i < first; ++i) absorb({request, token + i, context + i + 1, nullptr});
    }
    for (int64_t i = first; i < queries; ++i) {
      absorb({request, token + i, in_.top_k, in_.selected + (token + i) * in_.top_k});
    }
  }

  void finish() {
    run_absorbed();
    if (!expanded_.empty()) attend_expanded(in_, expanded_);
  }

 private:
  void absorb(const MlaQuery &query) {
    absorbed_.push_back(query);
    if (static_cast<int64_t>(absorbed_.size()) == kAbsorbedTokens) run_absorbed();
  }

  void run_absorbed() {
    if (!absorbed_.empty()) attend_absorbed(in_, absorbed_);
    absorbed_.clear();
  }

  const MlaInputs &in_;
  std::vector<MlaQuery> absorbed_;
  std::vector<MlaPart> expanded_;
  std::vector<std::vector<uint64_t>> masks_;
};

}  // namespace

void check_mla(const MlaInputs &in) {
  if (in.nope <= 0 || in.rope < 0 || in.v <= 0 || in.lora <= 0) {
    fail("nope_dim " + std::to_string(in.nope) + ", rope_dim " + std::to_string(in.rope) + ", v_dim " +
         std::to_string(in.v) + ", kv_lora_rank " + std::to_string(in.lora));
  }
  check_attention(in.step);
  if (in.selected != nullptr) check_selected(in);
}

bool mla_expands(const MlaInputs &in, int64_t queries, int64_t keys) {
  const int64_t pairs = queries * keys;
  return queries > 1 && expanded_cost(in, keys, pairs) < absorbed_cost(in, queries, pairs);
}

bool mla_masks(const MlaInputs &in, int64_t queries, int64_t keys) {
  const int64_t selecting = selecting_queries(in, queries, keys);
  if (selecting == 0 || queries == 1) return false;
  const int64_t first = queries - selecting, seen = keys - selecting, pairs = first * seen;
  const bool expands = mla_expands(in, first, seen);
  const int64_t of_first = expands ? expanded_cost(in, seen, pairs) : absorbed_cost(in, first, pairs);
  return expanded_cost(in, keys, queries * keys) < of_first + absorbed_cost(in, selecting, selecting * in.top_k);
}

void mla_attention(const MlaInputs &in) {
  clear_unowned(in.step, in.step.num_heads * in.v);
  Forms forms(in);
  for (int64_t request = 0; request < in.step.num_requests; ++request) {
    if (queries_of(in, request) > 0) forms.add(request);
  }
  forms.finish();
}

void mla_write(MlaWriteArgs args) {
  const int64_t width = args.lora + args.rope, first = args.begin;
  const int64_t grain = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, width));
  parallel_for(args.end - args.begin, grain, [&](int64_t begin, int64_t end) {
    const Scratch row(width * sizeof(float));
    MlaWriteArgs part = args;
    part.workspace = row.as<float>();
    part.begin = first + begin;
    part.end = first + end;
    mla_write_tokens(part);
  });
}

}  // namespace vllm_ms

// Attention of one step: checks, division into tasks, and their execution on the thread pool.
#pragma once

#include "kernels/attention.h"

namespace vllm_ms {

// Throws std::invalid_argument, naming the value, unless every request's queries, sequence and blocks lie within their
// tensors and the cache. Requests without queries are not looked at further.
void check_attention(const AttentionInputs &in);

// Throws std::invalid_argument unless all positions[begin:end] are rows of a table of `rows`. Tokens whose slot is
// negative are skipped if slots is not null.
void check_positions(const int64_t *positions, int64_t begin, int64_t end, int64_t rows, const int64_t *slots);

// Throws std::invalid_argument if a slot is num_slots or more.
void check_slots(const int64_t *slots, int64_t num_tokens, int64_t num_slots);

// Writes in.out for all tokens: attention where a request has queries, zeros elsewhere. Checked inputs only.
void attention(const AttentionInputs &in);

// args over all tokens [args.begin, args.end) on the thread pool; args.workspace is provided here.
void kv_write(KvWriteArgs args);
void rotary(const TransformHeadsArgs &args);
void inverse_rms(const InverseRmsArgs &args);

}  // namespace vllm_ms

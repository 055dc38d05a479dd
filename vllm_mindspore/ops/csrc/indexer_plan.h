// The lightning indexer of one step: checks, division into tasks, and their execution on the thread pool.
#pragma once

#include "kernels/indexer.h"

namespace vllm_ms {

// As check_attention, and that positions are exact as float. Throws std::invalid_argument.
void check_indexer(const IndexerInputs &in);

// Writes the step's keys into the cache, then out [num_tokens, top_k]: of each token the positions of the keys that it
// attends to, ascending; -1 behind them where it has fewer keys, and for tokens of no request. Checked inputs only.
void lightning_indexer(const IndexerInputs &in, float *out);

}  // namespace vllm_ms

// Multi-head latent attention of one step: checks, the choice of a form for each request, division into tasks, and
// their execution on the thread pool.
#pragma once

#include "kernels/mla.h"

namespace vllm_ms {

// As check_attention, and that the sizes fit together and selected positions are those of keys. Throws
// std::invalid_argument.
void check_mla(const MlaInputs &in);

// Whether a request with this many queries in the step, and keys (its own included), is served in expanded form: where
// that takes fewer multiplications. One query alone never is. Where later queries of a request attend to selected
// positions, it is asked of those before alone.
bool mla_expands(const MlaInputs &in, int64_t queries, int64_t keys);

// Whether a request in which queries attend to selected positions is served in expanded form as a whole, with what is
// not selected masked: where that takes fewer multiplications than selected latents in absorbed form.
bool mla_masks(const MlaInputs &in, int64_t queries, int64_t keys);

// Writes in.step.out for all tokens: attention where a request has queries, zeros elsewhere. Checked inputs only.
void mla_attention(const MlaInputs &in);

// args over all tokens [args.begin, args.end) on the thread pool; args.workspace is provided here.
void mla_write(MlaWriteArgs args);

}  // namespace vllm_ms

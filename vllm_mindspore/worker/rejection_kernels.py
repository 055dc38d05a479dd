"""Host forms of the Triton kernels of vLLM's rejection sampler (`vllm/v1/sample/rejection_sampler.py`).

Argument names and order are those of vLLM's kernels; the tensors live on the host. A request's drafted tokens are
`cu_num_draft_tokens[request - 1]` up to `cu_num_draft_tokens[request]`; results are written into `output_token_ids`,
[requests, max_spec_len + 1] int32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from vllm_mindspore.worker.host_kernels import hand_over


def _requests(cu_num_draft_tokens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(request, its first drafted token, their end)."""
    begin = 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        yield request, begin, end
        begin = end


def _accept(
    output: torch.Tensor,
    bonus: torch.Tensor,
    request: int,
    span: range,
    decide: Callable[[int, int], tuple[bool, int]],
) -> None:
    """decide(drafted token's row, its place) → whether it is accepted, and what is written."""
    for place, row in enumerate(span):
        accepted, token = decide(row, place)
        output[request, place] = token
        if not accepted:
            return
    output[request, len(span)] = bonus.view(-1)[request]


def rejection_greedy_sample(
    output_token_ids_ptr,
    cu_num_draft_tokens_ptr,
    draft_token_ids_ptr,
    target_argmax_ptr,
    bonus_token_ids_ptr,
    is_greedy_ptr,
    max_spec_len,
    uniform_probs_ptr,
    synthetic_conditional_rates_ptr,
    SYNTHETIC_MODE,
) -> None:
    """Greedy requests: drafted tokens up to the first that is not the model's best, then the model's."""

    def decide(row: int, place: int) -> tuple[bool, int]:
        best = int(target_argmax_ptr[row])
        return int(draft_token_ids_ptr[row]) == best, best

    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        if is_greedy_ptr is None or is_greedy_ptr[request]:
            _accept(output_token_ids_ptr, bonus_token_ids_ptr, request, range(begin, end), decide)


def rejection_random_sample(
    output_token_ids_ptr,
    cu_num_draft_tokens_ptr,
    draft_token_ids_ptr,
    draft_probs_ptr,
    target_probs_ptr,
    bonus_token_ids_ptr,
    recovered_token_ids_ptr,
    uniform_probs_ptr,
    is_greedy_ptr,
    max_spec_len,
    vocab_size,
    synthetic_conditional_rates_ptr,
    NO_DRAFT_PROBS,
    SYNTHETIC_MODE,
) -> None:
    """Other requests: a drafted token is accepted with probability p(token) / q(token), else a recovered one is it."""

    def decide(row: int, place: int) -> tuple[bool, int]:
        token = int(draft_token_ids_ptr[row])
        drafted = 1.0 if NO_DRAFT_PROBS else float(draft_probs_ptr[row, token])
        wanted = float(target_probs_ptr[row, token])
        accepted = token >= 0 and drafted > 0 and wanted / drafted >= float(uniform_probs_ptr[row])
        return accepted, token if accepted else int(recovered_token_ids_ptr[row])

    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        if not is_greedy_ptr[request]:
            _accept(output_token_ids_ptr, bonus_token_ids_ptr, request, range(begin, end), decide)


def expand(output_ptr, input_ptr, cu_num_tokens_ptr, replace_from, replace_to, MAX_NUM_TOKENS) -> None:
    """output: [drafted tokens], each request's value of `input` at its tokens, `replace_to` for `replace_from`."""
    counts = torch.diff(cu_num_tokens_ptr, prepend=cu_num_tokens_ptr.new_zeros(1))
    values = torch.where(input_ptr == replace_from, torch.full_like(input_ptr, replace_to), input_ptr)
    output_ptr.copy_(torch.repeat_interleave(values, counts))


def sample_recovered_tokens(
    output_token_ids_ptr,
    cu_num_draft_tokens_ptr,
    draft_token_ids_ptr,
    draft_probs_ptr,
    target_probs_ptr,
    inv_q_ptr,
    vocab_size,
    BLOCK_SIZE,
    NO_DRAFT_PROBS,
    USE_FP64_GUMBEL,
) -> None:
    """A token of each row from max(p - q, 0), or from p without the drafted token: [drafted tokens] int32."""
    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        if begin == end:
            continue
        left = target_probs_ptr[begin:end].clone()
        if NO_DRAFT_PROBS:
            left.scatter_(1, draft_token_ids_ptr[begin:end].long().clamp(min=0).unsqueeze(1), 0.0)
        else:
            left.sub_(draft_probs_ptr[begin:end]).clamp_(min=0.0)
        output_token_ids_ptr[begin:end] = (left * inv_q_ptr[request]).argmax(dim=1)


@functools.cache
def register() -> None:
    """Hand the kernels to vLLM's dispatcher, once in a process and only where drafts are made."""
    hand_over(KERNELS)


_MODULE = "vllm.v1.sample.rejection_sampler"
KERNELS = {
    f"{_MODULE}.{function.__name__}_kernel": function
    for function in (rejection_greedy_sample, rejection_random_sample, expand, sample_recovered_tokens)
}

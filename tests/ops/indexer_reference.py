"""The lightning indexer in numpy float64, and steps to try it on."""

from __future__ import annotations

import mindspore as ms
import numpy as np

from tests.ops import attention_reference as reference
from tests.ops.helpers import current_isa, normalise, stored, tensor
from vllm_mindspore.ops import registry

EPS = 1e-6
POSITIONS = 9000


class IndexerCase:
    """A step of random heads and keys over a cache of random keys, their values exact in the types they are stored in.

    Weights of heads are of both signs, as in a model, so that the best keys are not those of the longest products.
    """

    def __init__(self, heads, head_dim, rope, top_k, requests, block_size=16, cache="float32", weights="float32",
                 neox=True, seed=0):  # fmt: skip
        """requests: (query length, sequence length) pairs."""
        self.heads, self.head_dim, self.rope, self.top_k, self.neox = heads, head_dim, rope, top_k, neox
        self.cache_dtype, self.weights_dtype = cache, weights
        rng = np.random.default_rng(seed)
        self.step = reference.make_step(rng, requests, block_size, 1, 1)
        self.cache = stored(rng.standard_normal((len(self.step.kv_cache), 1, head_dim)), cache)
        tokens = self.step.num_tokens
        self.query = rng.standard_normal((tokens, heads * head_dim)).astype(np.float32)
        self.key_weights = rng.standard_normal((tokens, head_dim + heads)).astype(np.float32)
        self.gamma = stored(rng.standard_normal(head_dim) * 0.3 + 1, weights)
        self.beta = stored(rng.standard_normal(head_dim) * 0.3, weights)
        self.cos_sin = reference.make_cos_sin(POSITIONS, rope)
        self.positions, self.slots = self.step.token_positions(), self.step.slot_mapping()
        self.memory = tensor(self.cache, cache)

    def attributes(self) -> dict:
        return {
            "num_heads": self.heads, "head_dim": self.head_dim, "rope_dim": self.rope, "top_k": self.top_k,
            "neox": self.neox, "norm_eps": EPS, "block_size": self.step.block_size,
        }  # fmt: skip

    def inputs(self) -> list:
        arrays = (self.step.block_table, self.step.query_start_loc, self.step.seq_lens)
        norm = [tensor(array, self.weights_dtype) for array in (self.gamma, self.beta)]
        state = [ms.Tensor(np.ascontiguousarray(array)) for array in arrays]  # also where empty, as int32
        return [tensor(self.query), tensor(self.key_weights), tensor(self.positions), tensor(self.cos_sin), *norm,
                self.memory, tensor(self.slots), *state]  # fmt: skip

    def run(self) -> np.ndarray:
        """lightning_indexer: [T, top_k]; self.memory is written."""
        return registry.build("lightning_indexer", "cpu", (), **self.attributes())(*self.inputs()).asnumpy()

    def written(self) -> np.ndarray:
        """The cache after the step in float64, not rounded."""
        keys = normalise(self.key_weights[:, : self.head_dim].astype(np.float64), "layer", EPS, self.gamma, self.beta)
        cache, owned = self.cache.copy(), self.slots >= 0
        cache[self.slots[owned]] = reference.rotate(keys[:, None], self.positions, self.cos_sin, self.neox)[owned]
        return cache

    def scores(self) -> list[np.ndarray]:
        """Of each token [its keys] float64, on the cache as the operator left it."""
        cache = self.memory.astype(ms.float32).asnumpy()[:, 0].astype(np.float64)
        query = self.query.reshape(-1, self.heads, self.head_dim)
        query = reference.rotate(query, self.positions, self.cos_sin, self.neox)
        weights, found = self.key_weights[:, self.head_dim :].astype(np.float64), []
        for request, length in enumerate(self.step.seq_lens):
            first, last = self.step.query_start_loc[request : request + 2]
            keys = cache[self.step.slots(request, 0, length)]
            for token in range(first, last):
                seen = keys[: length - (last - token) + 1]
                found.append(weights[token] @ np.maximum(query[token] @ seen.T, 0))
        return found

    def tolerance(self) -> float:
        """What rounding may change of a score, whose size is about sqrt(heads * head_dim)."""
        size = np.sqrt(self.heads * self.head_dim)
        pairs = current_isa() in ("avx512", "amx") and self.cache_dtype == "bfloat16" and self.head_dim % 32 == 0
        return size * (2e-2 if pairs else 2e-6)


def check(found: np.ndarray, scores: list[np.ndarray], top_k: int, tolerance: float) -> int:
    """Raise AssertionError unless `found` are the best positions; returns how many tokens had to choose.

    Positions whose scores are within `tolerance` of the last one chosen may be there or not.
    """
    chosen = 0
    for token, wanted in enumerate(scores):
        count = min(top_k, len(wanted))
        positions = found[token, :count].astype(np.int64)
        assert (found[token, count:] == -1).all()
        assert (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < len(wanted)
        if len(wanted) <= top_k:
            continue
        chosen += 1
        boundary = np.partition(wanted, -top_k)[-top_k]
        left_out = np.setdiff1d(np.arange(len(wanted)), positions)
        assert wanted[positions].min() >= boundary - tolerance
        assert wanted[left_out].max() <= boundary + tolerance
    return chosen

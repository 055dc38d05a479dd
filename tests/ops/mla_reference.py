"""Multi-head latent attention in numpy float64, and steps to try it on."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np

from tests.ops import attention_reference as reference
from tests.ops.helpers import current_isa, stored, tensor
from vllm_mindspore.ops import registry

EPS = 1e-6
POSITIONS = 4000


@dataclass(frozen=True)
class Sizes:
    """num_heads, and the widths nope, rope, v of a head and lora of a latent."""

    heads: int
    nope: int
    rope: int
    v: int
    lora: int

    def attributes(self, block_size, scale):
        return {
            "num_heads": self.heads, "nope_dim": self.nope, "rope_dim": self.rope, "v_dim": self.v,
            "kv_lora_rank": self.lora, "scale": scale, "block_size": block_size,
        }  # fmt: skip


class Case:
    """A step of random queries over a random cache, its values exact in the types they are stored in."""

    def __init__(self, sizes, requests, block_size=16, cache="float32", weights="float32", magnitude=1.0, seed=0):
        """requests: (query length, sequence length) pairs. magnitude: of the logits, about."""
        self.sizes, self.cache_dtype, self.weights_dtype = sizes, cache, weights
        rng = np.random.default_rng(seed)
        self.step = reference.make_step(rng, requests, block_size, 1, 1)
        slots = len(self.step.kv_cache)
        self.cache = stored(rng.standard_normal((slots, 1, sizes.lora + sizes.rope)), cache)
        weight = rng.standard_normal((sizes.heads * (sizes.nope + sizes.v), sizes.lora)) / np.sqrt(sizes.lora)
        self.kv_b = stored(weight, weights)
        width = sizes.heads * (sizes.nope + sizes.rope)
        self.query = (rng.standard_normal((self.step.num_tokens, width)) * magnitude).astype(np.float32)
        self.scale = (sizes.nope + sizes.rope) ** -0.5
        self.rng = rng

    def state(self):
        arrays = (self.step.block_table, self.step.query_start_loc, self.step.seq_lens)
        return [ms.Tensor(np.ascontiguousarray(array)) for array in arrays]  # also where empty, as int32

    selected = None

    def select(self, top_k: int) -> Case:
        """Let tokens with more than top_k keys attend to some of them, at random: [T, top_k], ascending."""
        self.selected = np.full((self.step.num_tokens, top_k), -1, np.float32)
        for token, position in enumerate(self.step.token_positions()):
            count = min(top_k, position + 1)
            self.selected[token, :count] = np.sort(self.rng.permutation(position + 1)[:count])
        return self

    def present(self) -> tuple[str, ...]:
        return () if self.selected is None else ("selected",)

    def run(self) -> np.ndarray:
        """mla_attention on the cache as it is: [T, heads * v]."""
        attributes = self.sizes.attributes(self.step.block_size, self.scale)
        op = registry.build("mla_attention", "cpu", self.present(), **attributes)
        inputs = [tensor(self.query), tensor(self.kv_b, self.weights_dtype), tensor(self.cache, self.cache_dtype)]
        selected = [] if self.selected is None else [tensor(self.selected)]
        return op(*inputs, *self.state(), *selected).asnumpy()

    def expected(self) -> np.ndarray:
        return attention(self.query, self.kv_b, self.cache, self.step, self.sizes, self.scale, self.selected)


def attention(query, kv_b, cache, step, sizes, scale, selected=None) -> np.ndarray:
    """query [T, heads * (nope + rope)], rotated; [T, heads * v] float64, by expanding every latent."""
    query = np.asarray(query, np.float64).reshape(-1, sizes.heads, sizes.nope + sizes.rope)
    weight = np.asarray(kv_b, np.float64).reshape(sizes.heads, sizes.nope + sizes.v, sizes.lora)
    out = np.zeros((len(query), sizes.heads, sizes.v))
    for r, length in enumerate(step.seq_lens):
        first, last = step.query_start_loc[r], step.query_start_loc[r + 1]
        if first == last:
            continue
        rows = np.asarray(cache[step.slots(r, 0, length), 0], np.float64)
        expanded = np.einsum("kl,hpl->hkp", rows[:, : sizes.lora], weight)
        keys = np.concatenate(
            [expanded[..., : sizes.nope], np.broadcast_to(rows[:, sizes.lora :], (sizes.heads, length, sizes.rope))], -1
        )
        logits = np.einsum("qhd,hkd->hqk", query[first:last], keys) * scale
        position = np.arange(length - (last - first), length)
        seen = np.arange(length)[None, :] <= position[:, None]
        if selected is not None:
            for row, token in enumerate(range(first, last)):
                seen[row] &= np.isin(np.arange(length), selected[token])
        logits = np.where(seen, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[first:last] = np.einsum("hqk,hkv->qhv", weights, expanded[..., sizes.nope :])
    return out.reshape(len(query), -1)


def expands(sizes, queries, keys) -> bool:
    """Whether the operator serves such a request in expanded form: the rule of mla_plan.cc."""
    latent = (sizes.nope + sizes.v) * sizes.lora
    expanded = keys * latent + queries * keys * (sizes.nope + sizes.rope + sizes.v)
    absorbed = queries * latent + queries * keys * (2 * sizes.lora + sizes.rope)
    return queries > 1 and expanded < absorbed


def masks(sizes, queries, keys, top_k) -> bool:
    """Whether a request with selected positions is served in expanded form as a whole: the rule of mla_plan.cc."""
    selecting = min(max(keys - top_k, 0), queries)
    if selecting == 0 or queries == 1:
        return False
    latent, row = (sizes.nope + sizes.v) * sizes.lora, 2 * sizes.lora + sizes.rope
    pair = sizes.nope + sizes.rope + sizes.v
    first, seen = queries - selecting, keys - selecting
    of_first = seen * latent + first * seen * pair if expands(sizes, first, seen) else first * (latent + seen * row)
    return keys * latent + queries * keys * pair < of_first + selecting * (latent + top_k * row)


def tolerance(case) -> float:
    """Absolute, for logits of magnitude 1: what rounding queries, sums and weights to bf16 may change; 1e-5 without."""
    dots = current_isa() in ("avx512", "amx")
    rounded = dots and "bfloat16" in (case.cache_dtype, case.weights_dtype)
    return 1.5e-2 if rounded else 1e-5


class FusedCase(Case):
    """A step whose own latents are still in the projections: normed, rotated and written by mla_qkv_attention."""

    def __init__(self, sizes, requests, norm=True, rotated=True, neox=False, column=0, spare=0, norm_weights="float32",
                 **more):  # fmt: skip
        super().__init__(sizes, requests, **more)
        self.norm, self.rotated, self.neox, self.column = norm, rotated, neox, column
        self.norm_weights = norm_weights
        width = column + sizes.lora + sizes.rope + spare
        self.kv_a = self.rng.standard_normal((self.step.num_tokens, width)).astype(np.float32)
        self.gamma = stored(np.abs(self.rng.standard_normal(sizes.lora)) + 0.5, norm_weights)
        self.cos_sin = reference.make_cos_sin(POSITIONS, sizes.rope) if rotated else None
        self.positions, self.slots = self.step.token_positions(), self.step.slot_mapping()
        self.memory = tensor(self.cache, self.cache_dtype)

    def operator(self):
        present = (("cos_sin",) if self.rotated else ()) + (("kv_norm",) if self.norm else ()) + self.present()
        attributes = self.sizes.attributes(self.step.block_size, self.scale)
        return registry.build(
            "mla_qkv_attention", "cpu", present, **attributes, kv_column=self.column, neox=self.neox, norm_eps=EPS,
            norm_offset=0.0,
        )  # fmt: skip

    def run(self) -> np.ndarray:
        """The output; self.memory is written."""
        inputs = [tensor(self.query), tensor(self.kv_a), tensor(self.positions)]
        inputs += [tensor(self.cos_sin)] if self.rotated else []
        inputs += [tensor(self.gamma, self.norm_weights)] if self.norm else []
        inputs += [tensor(self.kv_b, self.weights_dtype), self.memory, tensor(self.slots), *self.state()]
        inputs += [] if self.selected is None else [tensor(self.selected)]
        return self.operator()(*inputs).asnumpy()

    def written(self) -> np.ndarray:
        """The cache after the step in float64, not rounded."""
        sizes = self.sizes
        latent = self.kv_a[:, self.column : self.column + sizes.lora].astype(np.float64)
        k_pe = self.kv_a[:, None, self.column + sizes.lora : self.column + sizes.lora + sizes.rope]
        latent = reference.rms(latent, self.gamma, EPS, 0.0) if self.norm else latent
        k_pe = reference.rotate(k_pe, self.positions, self.cos_sin, self.neox) if self.rotated else k_pe
        cache, owned = self.cache.copy(), self.slots >= 0
        cache[self.slots[owned], 0] = np.concatenate([latent, k_pe[:, 0]], -1)[owned]
        return cache

    def expected(self) -> np.ndarray:
        """The output in float64 on the cache as the operator left it."""
        sizes = self.sizes
        query = self.query.astype(np.float64).reshape(-1, sizes.heads, sizes.nope + sizes.rope)
        if self.rotated:
            query[..., sizes.nope :] = reference.rotate(
                query[..., sizes.nope :], self.positions, self.cos_sin, self.neox
            )
        cache = self.memory.astype(ms.float32).asnumpy()
        return attention(query, self.kv_b, cache, self.step, sizes, self.scale, self.selected)

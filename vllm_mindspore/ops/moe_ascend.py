"""Mixture of experts on Ascend: cells of MindSpore's own primitives. Checked by export on any machine.

`given` names a call's tensors in order. The grouped product wants weights [E, K, N], ours are [E, N, K]: unless the
device's compiler folds the transposition, it costs a copy of them in each step.
"""

from __future__ import annotations

from mindspore import float32 as ms_float32
from mindspore import int32 as ms_int32
from mindspore import int64 as ms_int64
from mindspore import ops
from mindspore.ops.auto_generate import gen_ops_prim as prim

from vllm_mindspore.ops.ascend import Activation, LayerNorm, RmsNorm, _Operator

LOWEST = -3.4028235e38


class MoeRoute(_Operator):
    """logits [T, E] → [T, 2 * top_k]: ids, then weights; all in float32."""

    def __init__(self, given, top_k, scoring, renormalize, num_expert_group, topk_group, balanced, scale):
        super().__init__(given)
        self.bias, self.expert_scale = self.position("bias"), self.position("expert_scale")
        self.top_k = top_k
        self.softmax = scoring == "softmax"
        self.renormalize = renormalize
        self.groups = num_expert_group
        self.topk_group = topk_group
        self.per_group = top_k // topk_group if balanced else 0
        self.scale = scale
        self.top = ops.TopK(sorted=True)

    def keep_best_groups(self, choice):
        grouped = choice.reshape((-1, self.groups, choice.shape[-1] // self.groups))
        if self.bias >= 0:
            worth = self.top(grouped, 2)[0].sum(-1)
        else:
            worth = self.top(grouped, 1)[0].sum(-1)
        best = self.top(worth, self.topk_group)[1]
        kept = ops.one_hot(best, self.groups).sum(1)
        masked = ops.select((ops.expand_dims(kept, -1) + ops.zeros_like(grouped)) > 0, grouped, LOWEST)
        return masked.reshape(choice.shape)

    def keep_best_of_each_group(self, choice):
        grouped = choice.reshape((-1, self.groups, choice.shape[-1] // self.groups))
        best = self.top(grouped, self.per_group)[1]
        kept = ops.one_hot(best, grouped.shape[-1]).sum(2)
        return ops.select(kept > 0, grouped, LOWEST).reshape(choice.shape)

    def construct(self, *tensors):
        logits = self.cast(tensors[0], ms_float32)
        scores = ops.softmax(logits, -1) if self.softmax else ops.sigmoid(logits)
        choice = scores
        if self.bias >= 0:
            choice = scores + self.cast(tensors[self.bias], ms_float32)
        if self.topk_group < self.groups:
            choice = self.keep_best_groups(choice)
        if self.per_group > 0:
            choice = self.keep_best_of_each_group(choice)
        ids = self.top(choice, self.top_k)[1]
        weights = ops.gather_elements(scores, 1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdims=True)
        weights = weights * self.scale
        if self.expert_scale >= 0:
            weights = weights * ops.gather(self.cast(tensors[self.expert_scale], ms_float32), ids, 0)
        return ops.concat((self.cast(ids, ms_float32), weights), 1)


class MoeCount(_Operator):
    """routing [T, 2 * top_k] → [experts]; an id that is no expert's is not counted."""

    def __init__(self, given, experts):
        super().__init__(given)
        self.experts = experts

    def construct(self, routing):
        ids = self.cast(routing[:, : routing.shape[1] // 2], ms_int32).reshape((-1,))
        return self.cast(ops.one_hot(ids, self.experts).sum(0), ms_float32)


class MoePlace(_Operator):
    """routing [T, 2 * top_k] of experts and expert_map [E, R] → the same routing of places."""

    def construct(self, routing, expert_map):
        top_k, replicas = routing.shape[1] // 2, expert_map.shape[1]
        ids = self.cast(routing[:, :top_k], ms_int32)
        counts = (self.cast(expert_map >= 0, ms_int32)).sum(1)
        count = ops.maximum(ops.gather(counts, ops.maximum(ids, 0), 0), 1)
        turns = ops.expand_dims(ops.cumsum(ops.ones_like(ids[:, 0]), 0) - 1, 1)
        replica = turns - turns // count * count
        places = ops.gather(expert_map.reshape((-1,)), ops.maximum(ids, 0) * replicas + replica, 0)
        places = ops.select(ids >= 0, places, -ops.ones_like(places))
        return ops.concat((self.cast(places, ms_float32), routing[:, top_k:]), 1)


class MoeLocal(_Operator):
    """routing [T, 2 * top_k] → ids relative to `first`, -1 where they are not in [first, first + count)."""

    def __init__(self, given, first, count):
        super().__init__(given)
        self.first, self.count = first, count

    def construct(self, routing):
        top_k = routing.shape[1] // 2
        ids = routing[:, :top_k] - self.first
        here = ops.logical_and(ids >= 0, ids < self.count)
        return ops.concat((ops.select(here, ids, -ops.ones_like(ids)), routing[:, top_k:]), 1)


class MoeExperts(_Operator):
    """x [T, H] and routing [T, 2 * top_k] → [T, N]; an id of -1 is the first expert's with no weight."""

    def __init__(self, given, norm, eps, norm_offset, activation, interleaved, alpha, beta, limit, weight_on_input):
        super().__init__(given)
        names = ("w13_bias", "w2_bias", "residual", "norm_weight", "norm_bias")
        self.w13_bias, self.w2_bias, self.residual, self.norm_weight, self.norm_bias = map(self.position, names)
        norm_given = ("x",) + tuple(name[5:] for name in ("norm_weight", "norm_bias") if name in given)
        self.normed = norm != ""
        self.norm = RmsNorm(norm_given, eps, norm_offset) if norm == "rms" else LayerNorm(norm_given, eps)
        self.clamped = activation == "clamped_silu_and_mul"
        self.activation = Activation(("x",), "silu_and_mul" if self.clamped else activation)
        self.interleaved = interleaved
        self.alpha, self.beta, self.limit = alpha, beta, limit
        self.weight_on_input = weight_on_input
        self.grouped = prim.GroupedMatmul(split_item=3, group_type=0)  # of rows grouped by expert
        self.sort = ops.Sort()

    def normalise(self, x, tensors):
        if not self.normed:
            return x
        if self.norm_weight >= 0 and self.norm_bias >= 0:
            return self.norm(x, tensors[self.norm_weight], tensors[self.norm_bias])
        if self.norm_weight >= 0:
            return self.norm(x, tensors[self.norm_weight])
        return self.norm(x)

    def product(self, rows, weight, ends):
        rows, columns = self.cast(rows, weight.dtype), ops.transpose(weight, (0, 2, 1))
        return self.cast(self.grouped([rows], [columns], None, None, None, None, None, ends)[0], ms_float32)

    def activate(self, sums):
        if self.interleaved:
            sums = sums.reshape((sums.shape[0], -1, 2)).transpose((0, 2, 1)).reshape((sums.shape[0], -1))
        if not self.clamped:
            return self.activation(sums)
        gate, up = ops.chunk(sums, 2, -1)
        gate, up = ops.minimum(gate, self.limit), ops.clamp(up, -self.limit, self.limit)
        return gate * ops.sigmoid(self.alpha * gate) * (up + self.beta)

    def construct(self, *tensors):
        x, routing, w13, w2 = tensors[0], tensors[1], tensors[2], tensors[3]
        top_k = routing.shape[1] // 2
        chosen = routing[:, :top_k]
        ids = self.cast(ops.maximum(chosen, 0.0), ms_int32).reshape((-1,))
        weights = (routing[:, top_k:] * self.cast(chosen >= 0, ms_float32)).reshape((-1, 1))
        experts, pairs = self.sort(self.cast(ids, ms_float32))
        experts = self.cast(experts, ms_int32)
        counts = ops.one_hot(ids, w13.shape[0]).sum(0)
        ends = self.cast(ops.cumsum(counts, 0), ms_int64)
        rows = ops.gather(self.normalise(x, tensors), pairs // top_k, 0)
        if self.weight_on_input:
            rows = rows * ops.gather(weights, pairs, 0)
        sums = self.product(rows, w13, ends)
        if self.w13_bias >= 0:
            sums = sums + self.cast(ops.gather(tensors[self.w13_bias], experts, 0), ms_float32)
        out = self.product(self.activate(sums), w2, ends)
        if self.w2_bias >= 0:
            out = out + self.cast(ops.gather(tensors[self.w2_bias], experts, 0), ms_float32)
        if not self.weight_on_input:
            out = out * ops.gather(weights, pairs, 0)
        back = self.sort(self.cast(pairs, ms_float32))[1]
        out = ops.gather(out, back, 0).reshape((-1, top_k, w2.shape[1])).sum(1)
        if self.residual >= 0:
            out = out + tensors[self.residual]
        return out

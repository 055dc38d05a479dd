"""Graph passes: FX graph in, FX graph out, number of matches returned. One file per pass.

`PASSES` is the order they run in. Each is on by default and can be left out by name (`VLLM_MS_DISABLE_PASSES`);
`vllm-mindspore inspect MODEL` prints the graph before and after each.
"""

from vllm_mindspore.graph_passes import (
    drop_batch,
    drop_noops,
    drop_views,
    fuse_activation,
    fuse_attention,
    fuse_bias,
    fuse_mla,
    fuse_moe,
    fuse_norm,
    fuse_residual,
    fuse_rms_norm,
    fuse_rotary,
    mask_ids,
    merge_duplicates,
    select_rows,
    take_columns,
    take_concat,
    take_scalars,
)
from vllm_mindspore.graph_passes.manager import GraphPass, PassManager, PassReport

PASSES: list[GraphPass] = [
    GraphPass("drop_noops", drop_noops.run),
    GraphPass("merge_duplicates", merge_duplicates.run),
    GraphPass("mask_ids", mask_ids.run),
    GraphPass("fuse_rms_norm", fuse_rms_norm.run),
    GraphPass("fuse_rotary", fuse_rotary.run),
    GraphPass("drop_batch", drop_batch.run),
    GraphPass("fuse_attention", fuse_attention.run),
    GraphPass("fuse_mla", fuse_mla.run),
    GraphPass("fuse_bias", fuse_bias.run),
    GraphPass("fuse_activation", fuse_activation.run),
    GraphPass("fuse_moe", fuse_moe.run),
    GraphPass("fuse_residual", fuse_residual.run),
    GraphPass("fuse_norm", fuse_norm.run),
    GraphPass("take_columns", take_columns.run),
    GraphPass("take_scalars", take_scalars.run),
    GraphPass("select_rows", select_rows.run),
    GraphPass("drop_views", drop_views.run),
    GraphPass("take_concat", take_concat.run),
]

__all__ = ["PASSES", "GraphPass", "PassManager", "PassReport"]

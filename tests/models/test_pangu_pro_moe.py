"""Pangu Pro MoE, a class of ours: its configuration, what it refuses, and where its experts are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from tests.ops.helpers import tensor
from vllm_mindspore.models import expert_parallel
from vllm_mindspore.models.pangu_pro_moe import expert_groups
from vllm_mindspore.models.pangu_pro_moe_config import PanguProMoEConfig
from vllm_mindspore.ops import registry

from .checkpoints import checkpoint
from .engine import engine
from .families import FAMILIES

NAME = "pangu-pro-moe"


def copied_configuration(folder, **changed) -> None:
    """The family's checkpoint without its weights, its configuration changed."""
    for file in checkpoint(NAME).iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            (folder / file.name).symlink_to(file)
    fields = json.loads((checkpoint(NAME) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changed}))


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_the_configuration_needs_no_code_of_the_checkpoint(trust_remote_code, tmp_path):
    copied_configuration(tmp_path)
    for file in tmp_path.glob("configuration_*.py"):
        file.unlink()
        file.write_text("raise AssertionError('code of the checkpoint was run')")
    args = EngineArgs(str(tmp_path), dtype="float32", trust_remote_code=trust_remote_code)
    found, expected = args.create_model_config().hf_config, FAMILIES[NAME].config()
    assert type(found) is PanguProMoEConfig
    for name in ("hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "vocab_size"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.rope_parameters["rope_theta"] == expected.rope_parameters["rope_theta"]


def test_a_configuration_of_another_architecture_has_its_own_fields_only():
    """PanguProMoEV2ForCausalLM, which is vLLM's, has the same model type."""
    fields = {"architectures": ["PanguProMoEV2ForCausalLM"], "n_routed_experts": 80, "rope_theta": 25600000}
    config = PanguProMoEConfig.from_dict(fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert not hasattr(config, "num_experts"), "vLLM would take it for the number of experts"
    assert PanguProMoEConfig.from_dict({"architectures": ["PanguProMoEForCausalLM"]}).num_experts == 64


@pytest.mark.parametrize(
    ("fields", "groups"), [({}, 8), (dict(num_experts=60, num_experts_per_tok=4), 4), (dict(n_group=4), 4)]
)
def test_a_token_takes_one_expert_of_each_group_unless_the_configuration_says_how_many_groups_there_are(fields, groups):
    assert expert_groups(PanguProMoEConfig(**fields)) == groups


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_experts=14), "14 experts do not divide into 3 groups"),
        (dict(n_group=5), "3 experts a token are not equally many of 5 groups"),
    ],
)
def test_groups_that_cannot_be_are_refused_before_weights_are_read(changed, message, tmp_path):
    copied_configuration(tmp_path, **changed)
    with pytest.raises(ValueError, match=message), engine(NAME, folder=tmp_path):
        pass


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_with_whole_groups_compute_as_many_pairs_of_token_and_expert(ranks):
    experts, groups, top_k = 64, 8, 16
    logits = np.random.default_rng(ranks).standard_normal((37, experts)).astype(np.float32)
    logits[:, :20] += 5
    route = registry.build(
        "moe_route", "cpu", (), top_k=top_k, scoring="softmax", renormalize=False, num_expert_group=groups,
        topk_group=groups, balanced=True, scale=1.0,
    )  # fmt: skip
    manager = SimpleNamespace(ep_size=ranks, placement_strategy="linear")
    layer = SimpleNamespace(global_num_experts=experts, expert_map_manager=manager)
    layout = SimpleNamespace(capacity=experts // ranks)
    places = expert_parallel.expert_map_of(layer, layout)
    placed = registry.build("moe_place", "cpu")(route(tensor(logits)), tensor(places.numpy())).asnumpy()
    pairs = np.bincount(placed[:, :top_k].astype(int).ravel() // layout.capacity, minlength=ranks)
    assert pairs.tolist() == [37 * top_k // ranks] * ranks
    assert torch.equal(places.sort(0).values[:, 0], torch.arange(experts, dtype=torch.int32))

"""openPangu's mixtures of experts (Embedded, which is dense, is in `hub_families.py`), as tiny random models."""

from . import moe_formats
from .family import Family, dims, make, rope
from .hub_families import REMOTE
from .latent_families import LATENT, UNGROUPED
from .pangu_models import PanguProMoeV2Config, PanguUltraMoeConfig

PANGU_FAMILIES = [
    Family(
        "pangu-ultra-moe",
        "PanguUltraMoEForCausalLM",
        make(
            PanguUltraMoeConfig,
            **dims(128, 4, 4, 219),
            **LATENT,
            **UNGROUPED,
            kv_lora_rank=44,
            q_lora_rank=36,
            routed_scaling_factor=2.5,
        ),
        "PanguUltraMoEForCausalLM",
        reference="hf-as DeepseekV3ForCausalLM with sandwich norms",
        hub_format=moe_formats.PANGU_ULTRA_MOE,
        llm=REMOTE,
        notes="latent attention, experts without groups, norms before and after attention and MLP",
    ),
    Family(
        "pangu-pro-moe-v2",
        "PanguProMoEV2ForCausalLM",
        make(
            PanguProMoeV2Config,
            **dims(112, 6, 2, 211),
            **UNGROUPED,
            qk_rope_head_dim=12,  # what the reference's rotary table is as wide as
            qk_nope_dim=20,
            qk_rope_dim=12,
            v_channels=24,
            param_sink_number=13,
            param_sink_with_value=True,
            routed_scaling_factor=2.5,
            rope_parameters=rope(),
        ),
        "PanguProMoEV2ForCausalLM",
        reference="hf-as DeepseekV3ForCausalLM with sandwich norms and sinks",
        hub_format=moe_formats.PANGU_PRO_MOE_V2,
        llm=REMOTE,
        notes="learned keys and values that every token sees, values narrower than keys, a norm on keys only",
        seed=2,  # with 0, bf16 decides ties of experts the other way
    ),
]

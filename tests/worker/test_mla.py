"""Latent attention layers keep one copy of their weights."""

from tests.models.engine import engine


def test_the_projection_of_latents_is_not_taken_apart():
    def weights(model) -> dict[str, tuple[int, int]]:
        """name → (address, bytes) of everything that the attention layers hold."""
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.data_ptr(), tensor.nbytes) for name, tensor in named if ".self_attn." in name}

    with engine("deepseek-v2-lite", "bfloat16") as llm:
        found = weights(llm.llm_engine.model_executor.driver_worker.get_model())
        names = {name.split(".self_attn.")[1] for name in found}
    assert "kv_b_proj.weight" in names
    assert not [name for name in names if "W_U" in name], "vLLM's own copies"
    assert len({address for address, _ in found.values()}) == len(found)

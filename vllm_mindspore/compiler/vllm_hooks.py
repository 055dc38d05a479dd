"""Objects vLLM asks for while it configures compilation, and which this backend does not use."""


class NoInductorPasses:
    """vLLM's default pass manager imports compiled CUDA passes; graphs here go through `graph_passes` instead."""

    def configure(self, config) -> None:
        """Nothing to configure: no Inductor graph is ever made."""

    def add(self, graph_pass) -> None:
        """Inductor passes have no graph to work on."""

    def uuid(self) -> str:
        return "vllm-mindspore"

    def __call__(self, graph) -> None:
        """Never called: `CompilationMode.NONE` makes no Inductor graph."""

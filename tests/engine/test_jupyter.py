"""`LLM(...)` in a Jupyter kernel with vLLM's defaults: the engine is a process of its own, started from a notebook."""

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from vllm_mindspore.demo import model_path

CELLS = (
    "from vllm import LLM, SamplingParams\nllm = LLM({model!r}, max_model_len=256, max_num_seqs=4)",
    "greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)\n"
    "len(llm.generate('Return a new list', greedy, use_tqdm=False)[0].outputs[0].token_ids)",
    "llm.collective_rpc('graph_statistics')[0]['model']['calls'] > 8",
    "import multiprocessing\n[child.name for child in multiprocessing.active_children()]",
    "del llm",
)


def test_an_engine_starts_and_generates_in_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    write_kernel_spec(str(tmp_path / "kernels" / "this"))
    cells = [nbformat.v4.new_code_cell(cell.format(model=str(model_path()))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="this").execute(cwd=str(tmp_path))
    results = [
        output.data["text/plain"]
        for cell in notebook.cells
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert results == ["8", "True", "['EngineCore']"]

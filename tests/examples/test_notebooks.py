"""The notebooks run from top to bottom in a real kernel."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path / "cache"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name=_kernel(tmp_path, monkeypatch))
    client.execute(cwd=str(tmp_path))
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert not errors


def _kernel(folder: Path, monkeypatch) -> str:
    """A kernel of this interpreter, whatever kernels the machine has."""
    from ipykernel.kernelspec import write_kernel_spec

    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    write_kernel_spec(str(folder / "jupyter" / "kernels" / "this"))
    assert KernelSpecManager().get_kernel_spec("this").argv[0] == sys.executable
    return "this"

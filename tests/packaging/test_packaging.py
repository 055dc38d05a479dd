"""What an installation of the package offers: metadata, entry points, import mapping, light imports."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def entry_points(group: str) -> dict[str, str]:
    found = metadata.distribution("vllm-mindspore").entry_points.select(group=group)
    return {entry.name: entry.value for entry in found}


def test_version_is_the_installed_one():
    from vllm_mindspore.version import __version__

    assert metadata.version("vllm-mindspore") == __version__


def test_vllm_finds_the_plugins():
    assert entry_points("vllm.platform_plugins") == {"mindspore": "vllm_mindspore.plugin:register_platform"}
    assert entry_points("vllm.general_plugins") == {"mindspore": "vllm_mindspore.plugin:register"}


@pytest.mark.parametrize("group", ["vllm.platform_plugins", "vllm.general_plugins", "console_scripts"])
def test_every_entry_point_loads(group):
    for entry in metadata.distribution("vllm-mindspore").entry_points.select(group=group):
        assert callable(entry.load())


def test_console_script_is_on_the_path_of_the_environment():
    script = Path(sys.executable).with_name("vllm-mindspore")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"vllm-mindspore {metadata.version('vllm-mindspore')}"


@pytest.mark.parametrize("folder", ["models", "graph_passes"])
def test_top_level_folders_import_as_subpackages_only(folder, tmp_path):
    code = f"import vllm_mindspore.{folder} as package; print(package.__file__)"
    assert Path(run_python(code, tmp_path)).parent.name == folder
    names = {str(file) for file in metadata.distribution("vllm-mindspore").files}
    assert not any(name.startswith(f"{folder}/") for name in names), "a top-level package with a common name"


def test_nothing_is_required_that_pip_could_replace():
    required = {line.split(";")[0].strip() for line in metadata.requires("vllm-mindspore") if "extra ==" not in line}
    assert required == {"packaging"}


@pytest.mark.parametrize(
    "module",
    ["vllm_mindspore", "vllm_mindspore.plugin", "vllm_mindspore.compat", "vllm_mindspore.cli", "vllm_mindspore.demo"],
)
def test_importing_a_hook_imports_nothing_heavy(module, tmp_path):
    heavy = ("torch", "mindspore", "vllm", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_registering_the_platform_does_not_import_mindspore(tmp_path):
    code = (
        "import sys; from vllm_mindspore import plugin; name = plugin.register_platform();"
        "print(name, [module for module in ('torch', 'mindspore') if module in sys.modules])"
    )
    assert run_python(code, tmp_path) == "vllm_mindspore.platform.MindSporePlatform []"


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert metadata.metadata("vllm-mindspore")["License-Expression"] == "Apache-2.0"


def test_every_python_folder_is_a_package():
    files = [file for top in ("vllm_mindspore", "models", "graph_passes") for file in (ROOT / top).rglob("*.py")]
    folders = {file.parent for file in files}
    left_out = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists())
    assert not left_out, f"setup.py leaves these out, they have no __init__.py: {left_out}"

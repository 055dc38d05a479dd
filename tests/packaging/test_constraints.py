"""deploy/constraints.txt pins everything, and what `pip check` still says is known and works."""

import importlib.util
import re
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy
import pytest

from vllm_mindspore import conflicts

ROOT = Path(__file__).parents[2]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pins = load_script("pins")
find_torch = load_script("find_torch")


def test_every_installed_package_is_pinned_in_its_version():
    pinned = {name: version for section in pins.read_pins().values() for name, version in section.items()}
    unpinned = []
    for distribution in metadata.distributions(path=[sysconfig.get_path("purelib")]):  # not vendored ones on sys.path
        name, version = pins.normalized(distribution.metadata["Name"]), distribution.version.split("+")[0]
        if name != "vllm-mindspore" and pinned.get(name) != version:
            unpinned.append(f"{name}=={version}")
    assert not unpinned


def test_conflicts_are_known_and_listed_in_the_constraints_file():
    found = conflicts.find_conflicts()
    assert [str(conflict) for conflict in found if conflict.reason is None] == []
    text = "".join(path.read_text() for path in pins.pin_files())
    for conflict in found:
        assert f"{conflict.distribution} {conflict.version} has requirement {conflict.requirement}" in text


def test_another_version_of_vllm_replaces_its_pins_and_nothing_else(monkeypatch):
    monkeypatch.delenv("VLLM", raising=False)
    usual = pins.read_pins()
    monkeypatch.setenv("VLLM", "0.33.0")
    other = pins.read_pins()
    assert other["vllm"] == {"vllm": "0.33.0"} != usual["vllm"]
    assert other.keys() == usual.keys()
    for section in other.keys() - {"vllm"}:
        assert other[section].items() >= usual[section].items()


def test_test_tools_are_pinned():
    extras = [line for line in metadata.requires("vllm-mindspore") if "extra ==" in line]
    wanted = {re.split("[<>=!;]", line)[0].strip() for line in extras}
    pinned = {name for section in pins.read_pins().values() for name in section}
    assert {pins.normalized(name) for name in wanted} <= pinned


def test_opencv_works_with_this_numpy():
    import cv2

    image = numpy.random.default_rng(0).integers(0, 255, (33, 47, 3), dtype=numpy.uint8)
    encoded, data = cv2.imencode(".png", image)
    assert encoded and (cv2.imdecode(data, cv2.IMREAD_COLOR) == image).all()
    assert cv2.resize(image, (20, 10)).shape == (10, 20, 3)


def test_constraints_reject_a_range(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text("# [packages]\nnumpy>=1.26\n")
    with pytest.raises(ValueError, match=r"constraints.txt:2: not an exact pin"):
        pins.read_pins(file)


def test_constraints_of_another_machine_are_left_out(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text("# [packages]\nnumpy==1.26.4\nfirst==1.0 ; platform_machine == 'sparc'\n")
    assert pins.read_pins(file) == {"packages": {"numpy": "1.26.4"}}


def make_distribution(site: Path, name: str, version: str, complete: bool) -> Path:
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if complete:
        (directory / "INSTALLER").write_text("pip\n")
        (directory / "RECORD").write_text(f"{name}-{version}.dist-info/INSTALLER,,\n")
    return directory


def test_half_installed_package_counts_as_missing(tmp_path):
    make_distribution(tmp_path, "Good_Name", "1.0+local", complete=True)
    broken = make_distribution(tmp_path, "broken", "2.0", complete=False)
    (tmp_path / "~roken").mkdir()
    assert pins.installed(tmp_path) == {"good-name": "1.0"}
    assert not broken.exists() and not (tmp_path / "~roken").exists()


CUDA_WHEEL = {"requires_dist": ["filelock", 'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"']}
CPU_WHEEL = {"requires_dist": ["filelock", 'nvidia-thing; extra == "cuda"']}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"torch==2.13.0+cpu": CPU_WHEEL}, ["torch==2.13.0+cpu"]),
        ({"torch==2.13.0": CPU_WHEEL}, ["torch==2.13.0"]),
        ({"torch==2.13.0": CUDA_WHEEL}, ["torch==2.13.0", "--index-url", find_torch.CPU_INDEX]),
        ({}, ["torch==2.13.0", "--index-url", find_torch.CPU_INDEX]),
    ],
)
def test_torch_comes_from_where_no_cuda_package_is_needed(monkeypatch, index, expected):
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    monkeypatch.setattr(find_torch, "offered", index.get)
    assert find_torch.pip_arguments("2.13.0") == expected


def test_users_torch_index_wins(monkeypatch):
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/cpu")
    monkeypatch.setattr(find_torch, "offered", lambda requirement: pytest.fail("asked another index"))
    assert find_torch.pip_arguments("2.13.0") == ["torch==2.13.0", "--index-url", "https://example.org/cpu"]

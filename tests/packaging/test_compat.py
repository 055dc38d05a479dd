"""A wrong version underneath stops at start, with a sentence that says what was found, what works, and what to do."""

import pytest

from vllm_mindspore import compat

GOOD = {"vllm": "0.32.0", "torch": "2.13.0+cpu", "mindspore": "2.10.0", "numpy": "1.26.4"}


@pytest.fixture
def versions(monkeypatch):
    found = dict(GOOD)
    monkeypatch.setattr(compat, "installed_version", found.get)
    return found


def test_this_environment_is_supported():
    assert compat.check_environment() == []


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("vllm", "0.32.0+empty"),
        ("vllm", "0.32.1.dev3+g12345"),
        ("vllm", "0.33.0"),
        ("torch", "2.13.0"),
        ("torch", "2.14.1+cpu"),
        ("mindspore", "2.10.1"),
        ("numpy", "1.25.0"),
    ],
)
def test_supported_versions(versions, name, version):
    versions[name] = version
    assert compat.check_environment() == []


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("vllm", "0.31.2"),
        ("vllm", "0.34.0rc1"),
        ("torch", "2.12.1"),
        ("torch", "2.15.0+cpu"),
        ("mindspore", "2.9.0"),
        ("mindspore", "2.11.0"),
        ("numpy", "2.0.0"),
        ("numpy", "1.24.4"),
    ],
)
def test_unsupported_version_is_named_with_the_supported_range(versions, name, version):
    versions[name] = version
    (problem,) = compat.check_environment()
    assert problem.startswith(f"{name} {version} is not supported (>=")


def test_numpy_2_says_why_and_what_to_install(versions):
    versions["numpy"] = "2.4.6"
    with pytest.raises(compat.UnsupportedEnvironmentError) as error:
        compat.require_supported_environment()
    assert "MindSpore 2.10 is built for NumPy 1.x" in str(error.value)
    assert "pip install 'numpy==1.26.4'" in str(error.value)


def test_all_problems_are_reported_at_once(versions):
    versions.update(numpy="2.1.0", torch="2.11.0")
    del versions["mindspore"]
    with pytest.raises(compat.UnsupportedEnvironmentError) as error:
        compat.require_supported_environment()
    assert len(error.value.problems) == 3
    assert "mindspore is not installed" in str(error.value)


def test_unreadable_version_is_a_problem_not_a_traceback(versions):
    versions["vllm"] = "dev"
    (problem,) = compat.check_environment()
    assert "unreadable version 'dev'" in problem

"""Packaging: maps `models/` and `graph_passes/` into the package and builds the C++ operators.

vLLM, PyTorch and MindSpore are not listed in `install_requires`: each of them has builds for different devices that pip
cannot tell apart, and an installation into an Ascend image must never replace what is there. Their versions are checked
when vLLM starts (`vllm_mindspore/compat.py`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
PACKAGE = "vllm_mindspore"
TOP_LEVEL_FOLDERS = ("models", "graph_passes")
SKIP_OPERATORS = "VLLM_MS_SKIP_OPS_BUILD"

TEST_REQUIREMENTS = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "nbclient",
    "nbformat",
    "ipykernel",
    "matplotlib",
    "openai",
    "psutil",
]


def version() -> str:
    text = (ROOT / PACKAGE / "version.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def packages() -> list[str]:
    found = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
    for folder in TOP_LEVEL_FOLDERS:
        name = f"{PACKAGE}.{folder}"
        found += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return found


class BuildWithOperators(build_py):
    """Compiles the CPU operators into the package before its files are collected."""

    def run(self):
        if os.environ.get(SKIP_OPERATORS) != "1":
            self.compile_operators()
        super().run()

    def compile_operators(self):
        # By path: importing the package would import what may not be visible in pip's isolated build environment.
        # -P: the modules beside build.py must not stand in for the standard library's.
        result = subprocess.run([sys.executable, "-P", str(ROOT / PACKAGE / "ops" / "build.py")])
        if result.returncode != 0:
            raise SystemExit(
                "The C++ operators could not be built (see above). g++ and an installed MindSpore are needed. "
                f"Set {SKIP_OPERATORS}=1 to install without them, for a device that does not use them."
            )


class PlatformDistribution(Distribution):
    """The wheel has machine code in it, although no Python extension module."""

    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    """The library has no Python ABI: the wheel is for any Python 3 of one platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    name="vllm-mindspore",
    version=version(),
    description="vLLM's own models, compiled to MindSpore graphs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"{PACKAGE}.{folder}": folder for folder in TOP_LEVEL_FOLDERS},
    package_data={
        PACKAGE: ["demo/**"],
        f"{PACKAGE}.ops": ["csrc/**", "lib/*.so", "lib/*.json"],
    },
    install_requires=["packaging"],
    extras_require={"test": TEST_REQUIREMENTS, "ngram": ["numba"], "ray": ["ray"]},
    entry_points={
        "console_scripts": ["vllm-mindspore = vllm_mindspore.cli:main"],
        "vllm.platform_plugins": ["mindspore = vllm_mindspore.plugin:register_platform"],
        "vllm.general_plugins": ["mindspore = vllm_mindspore.plugin:register"],
    },
    cmdclass={"build_py": BuildWithOperators, "bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
    zip_safe=False,
)

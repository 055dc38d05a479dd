"""csrc/aot_interface.h is the installed MindSpore's binary interface: its own header, called through ours."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from vllm_mindspore.ops import build

INCLUDES = (
    "include",
    "include/mindspore",
    "include/mindspore/core",
    "include/mindspore/core/include",
    "include/mindspore/core/mindrt/include",
    "include/mindspore/ccsrc",
    "include/mindspore/ccsrc/include",
    "include/mindspore/ops",
    "include/mindspore/ops/include",
    "include/third_party",
    "include/third_party/include",
    "include/third_party/robin_hood_hashing",
    "include/third_party/securec/include",
)

PROGRAM = r"""
#include <cstdio>
#include "aot_interface.h"
#include "mindspore/ccsrc/utils/custom_aot_extra.h"

// Implements MindSpore's class, as MindSpore does; each function answers with a value of its own.
class Theirs : public mindspore::AotExtra {
  bool HasAttr(std::string name) final { return name == "there"; }
  bool GetAttrBool(std::string name) final { return name == "bool"; }
  int64_t GetAttrInt(std::string name) final { return name == "int" ? -7 : 0; }
  float GetAttrFloat(std::string name) final { return name == "float" ? 0.5f : 0; }
  std::string GetAttrStr(std::string name) final { return name + "!"; }
  std::vector<int64_t> GetAttrIntVec(std::string name) final { return {1, static_cast<int64_t>(name.size())}; }
  std::vector<float> GetAttrFloatVec(std::string name) final { return {2.5f, static_cast<float>(name.size())}; }
  std::vector<std::vector<int64_t>> GetAttrInt2DVec(std::string) final { return {}; }
  std::vector<std::vector<float>> GetAttrFloat2DVec(std::string) final { return {}; }
};

struct Data : vllm_ms::aot::AotKernelData {
  static int destroyed;
  ~Data() override { ++destroyed; }
};
int Data::destroyed = 0;

int failed = 0;
void check(bool ok, const char *what) {
  if (ok) return;
  std::printf("differs: %s\n", what);
  failed = 1;
}

int main() {
  Theirs theirs;
  mindspore::AotExtra *base = &theirs;
  auto *ours = reinterpret_cast<vllm_ms::aot::AotExtra *>(base);
  check(sizeof(mindspore::AotExtra) == sizeof(vllm_ms::aot::AotExtra), "size");
  check(ours->HasAttr("there") && !ours->HasAttr("not there"), "HasAttr");
  check(ours->GetAttrBool("bool") && !ours->GetAttrBool("other"), "GetAttrBool");
  check(ours->GetAttrInt("int") == -7, "GetAttrInt");
  check(ours->GetAttrFloat("float") == 0.5f, "GetAttrFloat");
  check(ours->GetAttrStr("text longer than any small buffer") == "text longer than any small buffer!", "GetAttrStr");
  check(ours->GetAttrIntVec("abc") == std::vector<int64_t>({1, 3}), "GetAttrIntVec");
  check(ours->GetAttrFloatVec("ab") == std::vector<float>({2.5f, 2.0f}), "GetAttrFloatVec");
  base->SetWorkSpace({3, 4});
  check(ours->workspace == std::vector<size_t>({3, 4}), "workspace");
  auto *data = new Data;
  ours->kernel_data = data;
  check(reinterpret_cast<const void *>(base->KernelData()) == data, "kernel_data");
  base->DestructKernelData();
  check(Data::destroyed == 1 && ours->kernel_data == nullptr, "DestructKernelData");
  return failed;
}
"""


def test_our_declarations_are_mindspores(tmp_path):
    root = Path(importlib.util.find_spec("mindspore").origin).parent
    source = tmp_path / "interface.cc"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=0", "-DENABLE_FAST_HASH_TABLE", f"-I{build.CSRC}"]
    flags += [flag for folder in INCLUDES for flag in ("-isystem", str(root / folder))]
    libraries = [f"-L{root / 'lib'}", "-l:libmindspore_core.so", "-l:libmindspore_common.so"]
    libraries += ["-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{root / 'lib'}"]
    program = str(tmp_path / "interface")
    subprocess.run([*build.Compiler.find().command, *flags, str(source), *libraries, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

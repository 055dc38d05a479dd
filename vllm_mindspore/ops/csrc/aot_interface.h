// The part of MindSpore's AOT custom-operator interface (ccsrc/utils/custom_aot_extra.h, MindSpore 2.10) that the
// wrappers use, declared here so that they need not include it: MindSpore's header brings in hundreds of static
// Primitive objects, which are constructed when the library loads and collide with MindSpore's own. Member order and
// virtual-function order are the binary interface; tests/ops/test_aot_interface.py compares them with the installed
// header. Compile with _GLIBCXX_USE_CXX11_ABI=0, as MindSpore is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vllm_ms {
namespace aot {

class AotKernelData {
 public:
  virtual ~AotKernelData() = default;
};

class AotExtra {
 public:
  virtual ~AotExtra() = default;
  virtual bool HasAttr(std::string name) = 0;
  virtual bool GetAttrBool(std::string name) = 0;
  virtual int64_t GetAttrInt(std::string name) = 0;
  virtual float GetAttrFloat(std::string name) = 0;
  virtual std::string GetAttrStr(std::string name) = 0;
  virtual std::vector<int64_t> GetAttrIntVec(std::string name) = 0;
  virtual std::vector<float> GetAttrFloatVec(std::string name) = 0;

  std::vector<size_t> workspace;
  AotKernelData *kernel_data;
};

}  // namespace aot
}  // namespace vllm_ms

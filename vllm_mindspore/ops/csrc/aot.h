// Thin wrappers that make a kernel a MindSpore AOT custom operator. Only for files in wrappers/.
//
// An operator is a struct with
//   static constexpr const char *kName;                 the name in the operator library, for messages
//   static constexpr int kTensors;                      tensor arguments of its schema, optional ones included
//   explicit Op(const Attributes &);                    reads the attributes, once per primitive
//   Shape infer(const Inputs &) const;                  output shape; input dimensions unknown at compile time are -1
//   void run(const Inputs &, void *out) const;            calls the kernel
// and VLLM_MS_AOT_OPERATOR(Name, Op) exports Name, NameInit and NameInferShape, and enters the operator into the table
// that wrappers/sequence.cc looks its steps up in. The output is float32.
// infer and run report a wrong argument with fail(): at run time that becomes a message on stderr and a non-zero return.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "aot_interface.h"
#include "columns.h"
#include "dtype.h"

namespace vllm_ms {
namespace aot {

using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts &...parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void require(bool condition, const Parts &...parts) {
  if (!condition) fail(parts...);
}

// The non-tensor arguments of an operator: a primitive's attributes, or the text of a step of a sequence.
class Attributes {
 public:
  using Values = std::map<std::string, std::string>;
  explicit Attributes(AotExtra *extra) : extra_(extra) {}
  explicit Attributes(Values values) : extra_(nullptr), values_(std::move(values)) {}

  int64_t integer(const char *name) const {
    return extra_ ? checked(name)->GetAttrInt(name) : std::strtoll(value(name).c_str(), nullptr, 10);
  }
  float number(const char *name) const {
    return extra_ ? checked(name)->GetAttrFloat(name) : static_cast<float>(std::strtod(value(name).c_str(), nullptr));
  }
  bool flag(const char *name) const { return extra_ ? checked(name)->GetAttrBool(name) : value(name) == "True"; }
  std::string text(const char *name) const { return extra_ ? checked(name)->GetAttrStr(name) : value(name); }

 private:
  AotExtra *checked(const char *name) const {
    require(extra_->HasAttr(name), "missing attribute '", name, "'");
    return extra_;
  }
  const std::string &value(const char *name) const {
    const auto found = values_.find(name);
    require(found != values_.end(), "missing attribute '", name, "'");
    return found->second;
  }
  AotExtra *extra_;
  Values values_;
};

inline DType parse_dtype(const char *name) {
  const std::string text(name == nullptr ? "" : name);
  if (text == "float32") return DType::f32;
  if (text == "bfloat16") return DType::bf16;
  if (text == "float16") return DType::fp16;
  if (text == "int32") return DType::i32;
  if (text == "int64") return DType::i64;
  if (text == "uint8") return DType::u8;
  if (text == "bfloat16_columns") return DType::bf16_columns;
  return DType::other;
}

inline bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::fp16; }

// One tensor argument. Absent optional ones have `given` false, rank 0 and no data. No data at compile time either.
struct Tensor {
  bool given = false;
  void *data = nullptr;
  DType dtype = DType::other;
  int rank = 0;
  const int64_t *dims = nullptr;

  int64_t dim(int i) const { return dims[i < 0 ? rank + i : i]; }
  Shape shape() const { return Shape(dims, dims + rank); }
  int64_t numel() const { return product(0, rank); }
  int64_t rows() const { return product(0, rank - 1); }  // product of all dimensions but the last
  template <class T>
  const T *as() const {
    return static_cast<const T *>(data);
  }
  Weight weight() const { return given ? Weight{data, dtype} : Weight{}; }

 private:
  int64_t product(int begin, int end) const {
    int64_t n = 1;
    for (int i = begin; i < end; ++i) n *= dims[i];
    return n;
  }
};

// The tensor arguments of a call by their position in the schema. Attribute `present` is a bit mask over those
// positions, or -1 for all; MindSpore passes the present ones only.
class Inputs {
 public:
  Inputs(int64_t present, int schema_tensors, int given, void **data, const int *ranks, int64_t **shapes,
         const char **dtypes)
      : tensors_(schema_tensors) {
    int next = 0;
    for (int i = 0; i < schema_tensors; ++i) {
      if (present >= 0 && ((present >> i) & 1) == 0) continue;
      if (given >= 0) require(next < given, "attribute 'present' names more tensors than the ", given, " given");
      Tensor &t = tensors_[i];
      t.given = true;
      t.rank = ranks[next];
      t.dims = shapes[next];
      if (data != nullptr) t.data = data[next];
      if (dtypes != nullptr) t.dtype = parse_dtype(dtypes[next]);
      ++next;
    }
    if (given >= 0) require(next == given, given, " tensors given, attribute 'present' names ", next);
  }
  explicit Inputs(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}
  const Tensor &operator[](int position) const { return tensors_[position]; }
  int size() const { return static_cast<int>(tensors_.size()); }

 private:
  std::vector<Tensor> tensors_;
};

// Throws unless equal, or one of them is unknown (-1).
inline void require_equal(int64_t a, int64_t b, const char *what) {
  require(a == b || a < 0 || b < 0, what, ": ", a, " against ", b);
}

inline void require_rank(const Tensor &t, int rank, const char *name) {
  require(t.rank == rank, name, ": rank ", t.rank, ", expected ", rank);
}

// An optional [n] vector of weights.
inline void require_vector(const Tensor &t, int64_t n, const char *name) {
  if (!t.given) return;
  require_rank(t, 1, name);
  require_equal(t.dim(0), n, name);
}

inline void require_f32(const Tensor &t, const char *name) {
  require(t.dtype == DType::f32, name, ": activations must be float32");
}

inline void require_float(const Tensor &t, const char *name) {
  require(!t.given || is_float(t.dtype), name, ": must be float32, bfloat16 or float16");
}

// A matrix of a type that the kernels of linear layers read.
inline void require_matrix_weight(const Tensor &t, const char *name) {
  if (t.dtype != DType::bf16_columns && t.dtype != DType::bf16_coded) return require_float(t, name);
  require(columns_supported(), name, ": in columns, which ", isa_name(isa()), " does not read");
}

inline std::string describe(int count, const int *ranks, int64_t **shapes, const char **dtypes) {
  std::ostringstream text;
  for (int i = 0; i < count; ++i) {
    text << (i == 0 ? "" : ", ") << (dtypes == nullptr ? "" : dtypes[i]) << "[";
    for (int j = 0; j < ranks[i]; ++j) text << (j == 0 ? "" : ", ") << shapes[i][j];
    text << "]";
  }
  return text.str();
}

// An operator as a step of a sequence.
class Step {
 public:
  virtual ~Step() = default;
  virtual Shape infer(const Inputs &) const = 0;
  virtual void run(const Inputs &, void *out) const = 0;
};

struct StepType {
  int tensors;
  std::unique_ptr<Step> (*create)(const Attributes &);
};

// By name in the operator library. Filled when the library loads.
inline std::map<std::string, StepType> &step_types() {
  static std::map<std::string, StepType> types;
  return types;
}

template <class Op>
class OperatorStep : public Step {
 public:
  explicit OperatorStep(const Attributes &attributes) : op_(attributes) {}
  Shape infer(const Inputs &inputs) const override { return op_.infer(inputs); }
  void run(const Inputs &inputs, void *out) const override { op_.run(inputs, out); }

 private:
  Op op_;
};

template <class Op>
bool register_step() {
  step_types()[Op::kName] = {Op::kTensors, [](const Attributes &attributes) -> std::unique_ptr<Step> {
                               return std::make_unique<OperatorStep<Op>>(attributes);
                             }};
  return true;
}

// What differs for an operator whose number of tensors is an attribute.
template <class Op>
struct Construction {
  static std::shared_ptr<const Op> create(const Attributes &attributes) { return std::make_shared<Op>(attributes); }
  static int tensors(const Op &) { return Op::kTensors; }
};

template <class Op>
struct KernelData : AotKernelData {
  explicit KernelData(const Attributes &attributes)
      : present(attributes.integer("present")), op(Construction<Op>::create(attributes)) {}
  int64_t present;
  std::shared_ptr<const Op> op;
};

template <class Op>
Shape infer_shape(int *ranks, int64_t **shapes, AotExtra *extra) {
  try {
    const Attributes attributes(extra);
    const auto op = Construction<Op>::create(attributes);
    const int tensors = Construction<Op>::tensors(*op);
    return op->infer(Inputs(attributes.integer("present"), tensors, -1, nullptr, ranks, shapes, nullptr));
  } catch (const std::invalid_argument &error) {
    throw std::runtime_error(std::string("vllm_ms.") + Op::kName + ": " + error.what());
  }
}

template <class Op>
int init(AotExtra *extra) {
  try {
    const Attributes attributes(extra);
    extra->kernel_data = new KernelData<Op>(attributes);
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "vllm_ms.%s: %s\n", Op::kName, error.what());
    return 1;
  }
}

template <class Op>
int run(int count, void **data, int *ranks, int64_t **shapes, const char **dtypes, void *extra) {
  try {
    const auto *kernel =
        static_cast<const KernelData<Op> *>(static_cast<AotExtra *>(extra)->kernel_data);
    require(kernel != nullptr, "not initialised");
    const int tensors = Construction<Op>::tensors(*kernel->op), last = count - 1;
    const Inputs inputs(kernel->present, tensors, last, data, ranks, shapes, dtypes);
    require(kernel->op->infer(inputs) == Shape(shapes[last], shapes[last] + ranks[last]), "unexpected output shape");
    kernel->op->run(inputs, data[last]);
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "vllm_ms.%s: %s; inputs and output %s\n", Op::kName, error.what(),
                 describe(count, ranks, shapes, dtypes).c_str());
    return 1;
  }
}

}  // namespace aot
}  // namespace vllm_ms

#define VLLM_MS_EXPORT extern "C" __attribute__((visibility("default")))

#define VLLM_MS_AOT_OPERATOR(Name, Op)                                                                         \
  static const bool Name##_registered = vllm_ms::aot::register_step<Op>();                                     \
  VLLM_MS_AOT_EXPORTS(Name, Op)

// Without the table's entry.
#define VLLM_MS_AOT_EXPORTS(Name, Op)                                                                          \
  VLLM_MS_EXPORT vllm_ms::aot::Shape Name##InferShape(int *ranks, int64_t **shapes, vllm_ms::aot::AotExtra *extra) { \
    return vllm_ms::aot::infer_shape<Op>(ranks, shapes, extra);                                                \
  }                                                                                                            \
  VLLM_MS_EXPORT int Name##Init(int *, int64_t **, const char **, vllm_ms::aot::AotExtra *extra) {             \
    return vllm_ms::aot::init<Op>(extra);                                                                      \
  }                                                                                                            \
  VLLM_MS_EXPORT int Name(int count, void **data, int *ranks, int64_t **shapes, const char **dtypes, void *,   \
                          void *extra) {                                                                       \
    return vllm_ms::aot::run<Op>(count, data, ranks, shapes, dtypes, extra);                                   \
  }

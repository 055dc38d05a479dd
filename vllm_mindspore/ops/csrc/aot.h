// Thin wrappers that make a kernel a MindSpore AOT custom operator. Only for files in wrappers/.
//
// An operator is a struct with
//   static constexpr const char *kName;                 the name in the operator library, for messages
//   static constexpr int kTensors;                      tensor arguments of its schema, optional ones included
//   explicit Op(const Attributes &);                    reads the attributes, once per primitive
//   Shape infer(const Inputs &) const;                  output shape; input dimensions unknown at compile time are -1
//   void run(const Inputs &, void *out) const;            calls the kernel
// and VLLM_MS_AOT_OPERATOR(Name, Op) exports Name, NameInit and NameInferShape. The output is float32.
// infer and run report a wrong argument with fail(): at run time that becomes a message on stderr and a non-zero return.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "aot_interface.h"
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

class Attributes {
 public:
  explicit Attributes(AotExtra *extra) : extra_(extra) {}
  int64_t integer(const char *name) const { return checked(name)->GetAttrInt(name); }
  float number(const char *name) const { return checked(name)->GetAttrFloat(name); }
  bool flag(const char *name) const { return checked(name)->GetAttrBool(name); }
  std::string text(const char *name) const { return checked(name)->GetAttrStr(name); }

 private:
  AotExtra *checked(const char *name) const {
    require(extra_->HasAttr(name), "missing attribute '", name, "'");
    return extra_;
  }
  AotExtra *extra_;
};

inline DType parse_dtype(const char *name) {
  const std::string text(name == nullptr ? "" : name);
  if (text == "float32") return DType::f32;
  if (text == "bfloat16") return DType::bf16;
  if (text == "float16") return DType::fp16;
  if (text == "int32") return DType::i32;
  if (text == "int64") return DType::i64;
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
// positions; MindSpore passes the present ones only.
class Inputs {
 public:
  Inputs(int64_t present, int schema_tensors, int given, void **data, const int *ranks, int64_t **shapes,
         const char **dtypes)
      : tensors_(schema_tensors) {
    int next = 0;
    for (int i = 0; i < schema_tensors; ++i) {
      if (((present >> i) & 1) == 0) continue;
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

inline std::string describe(int count, const int *ranks, int64_t **shapes, const char **dtypes) {
  std::ostringstream text;
  for (int i = 0; i < count; ++i) {
    text << (i == 0 ? "" : ", ") << (dtypes == nullptr ? "" : dtypes[i]) << "[";
    for (int j = 0; j < ranks[i]; ++j) text << (j == 0 ? "" : ", ") << shapes[i][j];
    text << "]";
  }
  return text.str();
}

template <class Op>
struct KernelData : AotKernelData {
  KernelData(int64_t present, const Attributes &attributes) : present(present), op(attributes) {}
  int64_t present;
  Op op;
};

template <class Op>
Shape infer_shape(int *ranks, int64_t **shapes, AotExtra *extra) {
  try {
    const Attributes attributes(extra);
    const Op op(attributes);
    return op.infer(Inputs(attributes.integer("present"), Op::kTensors, -1, nullptr, ranks, shapes, nullptr));
  } catch (const std::invalid_argument &error) {
    throw std::runtime_error(std::string("vllm_ms.") + Op::kName + ": " + error.what());
  }
}

template <class Op>
int init(AotExtra *extra) {
  try {
    const Attributes attributes(extra);
    extra->kernel_data = new KernelData<Op>(attributes.integer("present"), attributes);
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
    const Inputs inputs(kernel->present, Op::kTensors, count - 1, data, ranks, shapes, dtypes);
    const int last = count - 1;
    require(kernel->op.infer(inputs) == Shape(shapes[last], shapes[last] + ranks[last]), "unexpected output shape");
    kernel->op.run(inputs, data[last]);
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

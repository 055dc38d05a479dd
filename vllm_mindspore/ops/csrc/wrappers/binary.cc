#include "../kernels/binary.h"

#include <algorithm>

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

// Size of dimension d of an output of rank `rank`, for an operand aligned at the last dimension.
int64_t broadcast_dim(const Tensor &t, int rank, int d) {
  const int own = d - (rank - t.rank);
  return own < 0 ? 1 : t.dim(own);
}

// A dimension that is unknown at compile time (-1) may turn out to be 1: with a known one above 1 the result is known.
int64_t broadcast(int64_t a, int64_t b) {
  if (a == b || b == 1) return a;
  if (a == 1) return b;
  if (a < 0) return b;
  if (b < 0) return a;
  fail("cannot broadcast ", a, " with ", b);
}

BinaryOp op_of(const Attributes &a) {
  const std::string text = a.text("op");
  BinaryOp op;
  require(parse_binary_op(text.c_str(), &op), "unknown op '", text, "'");
  return op;
}

struct BinaryOperator {
  static constexpr const char *kName = "binary";
  static constexpr int kTensors = 2;
  BinaryOp op;

  explicit BinaryOperator(const Attributes &a) : op(op_of(a)) {}

  Shape infer(const Inputs &in) const {
    const int rank = std::max(in[0].rank, in[1].rank);
    require(rank <= kMaxBinaryRank, "rank ", rank, " above ", kMaxBinaryRank);
    Shape out(rank);
    for (int d = 0; d < rank; ++d) out[d] = broadcast(broadcast_dim(in[0], rank, d), broadcast_dim(in[1], rank, d));
    return out;
  }

  void run(const Inputs &in, void *out) const {
    require_float(in[0], "x");
    require_float(in[1], "y");
    const Shape shape = infer(in);
    BinaryArgs args{};
    args.x = in[0].data;
    args.y = in[1].data;
    args.x_dtype = in[0].dtype;
    args.y_dtype = in[1].dtype;
    args.out = static_cast<float *>(out);
    args.rank = static_cast<int>(shape.size());
    args.op = op;
    int64_t x_stride = 1, y_stride = 1;
    for (int d = args.rank - 1; d >= 0; --d) {
      const int64_t x_dim = broadcast_dim(in[0], args.rank, d), y_dim = broadcast_dim(in[1], args.rank, d);
      args.dims[d] = shape[d];
      args.x_strides[d] = x_dim == 1 ? 0 : x_stride;
      args.y_strides[d] = y_dim == 1 ? 0 : y_stride;
      x_stride *= x_dim;
      y_stride *= y_dim;
    }
    binary(args);
  }
};

struct BinaryScalarOperator {
  static constexpr const char *kName = "binary_scalar";
  static constexpr int kTensors = 1;
  float y;
  BinaryOp op;

  explicit BinaryScalarOperator(const Attributes &a) : y(a.number("y")), op(op_of(a)) {}

  Shape infer(const Inputs &in) const { return in[0].shape(); }

  void run(const Inputs &in, void *out) const {
    require_float(in[0], "x");
    BinaryArgs args{};
    args.x = in[0].data;
    args.x_dtype = in[0].dtype;
    args.y = &y;
    args.y_dtype = DType::f32;
    args.out = static_cast<float *>(out);
    args.rank = 1;
    args.dims[0] = in[0].numel();
    args.x_strides[0] = 1;
    args.op = op;
    binary(args);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(Binary, vllm_ms::aot::BinaryOperator)
VLLM_MS_AOT_OPERATOR(BinaryScalar, vllm_ms::aot::BinaryScalarOperator)

#include "binary.h"

#include "../parallel.h"
#include "../vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

template <BinaryOp op>
VLLM_MS_INLINE Vec apply(Vec a, Vec b) {
  switch (op) {
    case BinaryOp::add:
      return a + b;
    case BinaryOp::sub:
      return a - b;
    case BinaryOp::mul:
      return a * b;
    case BinaryOp::div:
      return a / b;
    case BinaryOp::maximum:
      return a != a ? a : (a > b ? a : b);
    default:
      return a != a ? a : (a < b ? a : b);
  }
}

constexpr int64_t kSegment = 512;  // elements worked on at a time; a multiple of every kLanes

// Elements [i, i + n) of a row as floats: the row itself, or filled into `buffer`. A stride of 0 repeats one value.
const float *operand(const void *row, DType dtype, int64_t stride, int64_t i, int64_t n, float *buffer) {
  if (dtype == DType::f32 && stride != 0) return static_cast<const float *>(row) + i;
  VLLM_MS_DISPATCH_FLOAT(dtype, T, {
    const T *p = static_cast<const T *>(row);
    if (stride == 0) {
      const Vec value = set1(to_float(*p));
      for (int64_t k = 0; k < n; k += kLanes) store(buffer + k, value);
    } else {
      int64_t k = 0;
      for (; k + kLanes <= n; k += kLanes) store(buffer + k, load(p + i + k));
      for (; k < n; ++k) buffer[k] = to_float(p[i + k]);
    }
  });
  return buffer;
}

template <BinaryOp op>
void apply_segment(const float *x, const float *y, float *out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, apply<op>(load(x + i), load(y + i)));
  if (i < n) store_n(out + i, apply<op>(load_n(x + i, n - i), load_n(y + i, n - i)), n - i);
}

template <BinaryOp op>
void run(const BinaryArgs &args) {
  constexpr int64_t kElementsPerChunk = 16384;
  const int last = args.rank - 1;
  const int64_t width = args.dims[last];
  const int64_t segments = (width + kSegment - 1) / kSegment;  // per row
  int64_t rows = 1;
  for (int d = 0; d < last; ++d) rows *= args.dims[d];
  const int64_t grain = kElementsPerChunk / (width < kSegment ? width : kSegment);
  parallel_for(rows * segments, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float x_buffer[kSegment], y_buffer[kSegment];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / segments, i = unit % segments * kSegment;
      int64_t x_offset = 0, y_offset = 0, rest = row;
      for (int d = last - 1; d >= 0; --d) {
        const int64_t index = rest % args.dims[d];
        rest /= args.dims[d];
        x_offset += index * args.x_strides[d];
        y_offset += index * args.y_strides[d];
      }
      const char *x_row = static_cast<const char *>(args.x) + x_offset * dtype_size(args.x_dtype);
      const char *y_row = static_cast<const char *>(args.y) + y_offset * dtype_size(args.y_dtype);
      const int64_t n = width - i < kSegment ? width - i : kSegment;
      const float *x = operand(x_row, args.x_dtype, args.x_strides[last], i, n, x_buffer);
      const float *y = operand(y_row, args.y_dtype, args.y_strides[last], i, n, y_buffer);
      apply_segment<op>(x, y, args.out + row * width + i, n);
    }
  });
}

// Merges neighbouring dimensions that both operands walk alike, so that rows are long. Ranks and sizes of 0 and 1 too.
BinaryArgs collapsed(const BinaryArgs &args) {
  BinaryArgs result = args;
  int rank = 0;
  for (int d = 0; d < args.rank; ++d) {
    if (args.dims[d] == 1) continue;
    const int previous = rank - 1;
    if (rank > 0 && result.x_strides[previous] == args.x_strides[d] * args.dims[d] &&
        result.y_strides[previous] == args.y_strides[d] * args.dims[d]) {
      result.dims[previous] *= args.dims[d];
      result.x_strides[previous] = args.x_strides[d];
      result.y_strides[previous] = args.y_strides[d];
      continue;
    }
    result.dims[rank] = args.dims[d];
    result.x_strides[rank] = args.x_strides[d];
    result.y_strides[rank] = args.y_strides[d];
    ++rank;
  }
  if (rank == 0) {
    result.dims[0] = 1;
    result.x_strides[0] = result.y_strides[0] = 0;
    rank = 1;
  }
  result.rank = rank;
  return result;
}

}  // namespace

void binary(const BinaryArgs &args) {
  for (int d = 0; d < args.rank; ++d) {
    if (args.dims[d] == 0) return;
  }
  const BinaryArgs merged = collapsed(args);
  switch (args.op) {
    case BinaryOp::add:
      return run<BinaryOp::add>(merged);
    case BinaryOp::sub:
      return run<BinaryOp::sub>(merged);
    case BinaryOp::mul:
      return run<BinaryOp::mul>(merged);
    case BinaryOp::div:
      return run<BinaryOp::div>(merged);
    case BinaryOp::maximum:
      return run<BinaryOp::maximum>(merged);
    default:
      return run<BinaryOp::minimum>(merged);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

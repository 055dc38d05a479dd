// Rows of two tensors side by side.
#include <cstring>

#include "../aot.h"
#include "../parallel.h"

namespace vllm_ms {
namespace aot {
namespace {

struct ConcatOp {
  static constexpr const char *kName = "concat";
  static constexpr int kTensors = 2;

  explicit ConcatOp(const Attributes &) {}

  Shape infer(const Inputs &in) const {
    require(in[0].rank > 0 && in[0].rank == in[1].rank, "ranks ", in[0].rank, " and ", in[1].rank);
    Shape shape = in[0].shape();
    for (int d = 0; d + 1 < in[0].rank; ++d) {
      if (shape[d] < 0) shape[d] = in[1].dim(d);
      if (in[1].dim(d) >= 0) require_equal(shape[d], in[1].dim(d), "rows of x and y");
    }
    shape.back() = in[0].dim(-1) < 0 || in[1].dim(-1) < 0 ? -1 : in[0].dim(-1) + in[1].dim(-1);
    return shape;
  }

  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    require_f32(in[1], "y");
    infer(in);
    const int64_t left = in[0].dim(-1), right = in[1].dim(-1), width = left + right;
    const float *x = in[0].as<float>(), *y = in[1].as<float>();
    parallel_for(in[0].rows(), 1 + (1 << 14) / (width + 1), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float *to = static_cast<float *>(out) + row * width;
        std::memcpy(to, x + row * left, left * sizeof(float));
        std::memcpy(to + left, y + row * right, right * sizeof(float));
      }
    });
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(Concat, vllm_ms::aot::ConcatOp)

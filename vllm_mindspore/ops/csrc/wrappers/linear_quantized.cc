#include "../kernels/linear_quantized.h"

#include "linear.h"

namespace vllm_ms {
namespace aot {
namespace {

// Tensors: x, weight and scale as quantized_weight.h has them, then as of `linear`. Attribute `rows`: n.
template <int bits>
struct LinearQuantizedOp {
  static constexpr const char *kName = bits == 4 ? "linear_int4" : "linear_int8";
  static constexpr int kTensors = 7;
  enum { kX, kWeight, kScale, kBias };
  FusedLinear fused;
  int64_t rows;

  explicit LinearQuantizedOp(const Attributes &a) : fused(a, kBias), rows(a.integer("rows")) {}

  Shape infer(const Inputs &in) const {
    require(in[kX].rank >= 1, "x: rank 0");
    const int64_t k = in[kX].dim(-1);
    require(k > 0, "last dimension of x: ", k, ", expected a known size");
    require_packed(in[kWeight], quant_tile_bytes(k, bits) / (4 * kQuantRows), 4 * kQuantRows, "weight");
    require_packed(in[kScale], quant_scales(k, bits), kQuantRows, "scale");
    return fused.infer(in, rows, k);
  }

  void run(const Inputs &in, void *out) const {
    const Tensor &weight = in[kWeight], &scale = in[kScale];
    require(weight.dtype == DType::u8, "weight: must be uint8");
    require(scale.dtype == DType::f32, "scale: must be float32");
    linear_quantized({fused.arguments(in, out, Weight{}, rows, in[kX].dim(-1)),
                      {weight.as<uint8_t>(), scale.as<float>(), bits}});
  }

 private:
  void require_packed(const Tensor &t, int64_t depth, int64_t width, const char *name) const {
    require_rank(t, 3, name);
    const int64_t expected[] = {quant_tiles(rows), depth, width};
    for (int i = 0; i < 3; ++i) {
      require(t.dim(i) == expected[i], name, ": dimension ", i, " is ", t.dim(i), ", expected ", expected[i], " for ",
              rows, " rows");
    }
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(LinearInt8, vllm_ms::aot::LinearQuantizedOp<8>)
VLLM_MS_AOT_OPERATOR(LinearInt4, vllm_ms::aot::LinearQuantizedOp<4>)

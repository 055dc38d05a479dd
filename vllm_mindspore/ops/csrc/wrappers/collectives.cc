#include "../collectives.h"

#include "../aot.h"

namespace vllm_ms {
namespace aot {
namespace {

// Shared by the three: x float32, and the group by its name. It is looked up at every call: a graph may be made before
// its process joins.
struct Collective {
  std::string name;
  explicit Collective(const Attributes &a) : name(a.text("group")) {}

  Group &joined() const { return group(name); }
};

struct AllReduceOp : Collective {
  static constexpr const char *kName = "all_reduce";
  static constexpr int kTensors = 1;
  using Collective::Collective;

  Shape infer(const Inputs &in) const { return in[0].shape(); }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    joined().all_reduce(in[0].data, in[0].numel(), DType::f32, out);
  }
};

// Elements of the dimensions before `dim`, and from it on.
struct Sides {
  int64_t outer = 1, inner = 1;
  Sides(const Tensor &x, int64_t dim) {
    for (int i = 0; i < x.rank; ++i) (i < dim ? outer : inner) *= x.dim(i);
  }
};

struct Resizing : Collective {
  int64_t dim, size;
  explicit Resizing(const Attributes &a) : Collective(a), dim(a.integer("dim")), size(a.integer("size")) {}

  void check(const Tensor &x) const {
    require(dim >= 0 && dim < x.rank, "dim ", dim, " of a tensor of rank ", x.rank);
  }
  Group &joined_with_size() const {
    Group &found = joined();
    require(found.size() == size, "group ", name, " has ", found.size(), " ranks, the graph was made for ", size);
    return found;
  }
};

struct AllGatherOp : Resizing {
  static constexpr const char *kName = "all_gather";
  static constexpr int kTensors = 1;
  using Resizing::Resizing;

  Shape infer(const Inputs &in) const {
    check(in[0]);
    Shape shape = in[0].shape();
    if (shape[dim] >= 0) shape[dim] *= size;
    return shape;
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides sides(in[0], dim);
    joined_with_size().all_gather(in[0].data, sides.outer, sides.inner, DType::f32, out);
  }
};

struct ReduceScatterOp : Resizing {
  static constexpr const char *kName = "reduce_scatter";
  static constexpr int kTensors = 1;
  using Resizing::Resizing;

  Shape infer(const Inputs &in) const {
    check(in[0]);
    Shape shape = in[0].shape();
    require(shape[dim] < 0 || shape[dim] % size == 0, "dimension ", dim, " of ", shape[dim], " over ", size, " ranks");
    if (shape[dim] >= 0) shape[dim] /= size;
    return shape;
  }
  void run(const Inputs &in, void *out) const {
    require_f32(in[0], "x");
    const Sides sides(in[0], dim);
    joined_with_size().reduce_scatter(in[0].data, sides.outer, sides.inner / size, DType::f32, out);
  }
};

}  // namespace
}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_OPERATOR(AllReduce, vllm_ms::aot::AllReduceOp)
VLLM_MS_AOT_OPERATOR(AllGather, vllm_ms::aot::AllGatherOp)
VLLM_MS_AOT_OPERATOR(ReduceScatter, vllm_ms::aot::ReduceScatterOp)

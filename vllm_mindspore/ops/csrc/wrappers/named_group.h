// What operators of collectives share: the group by its name, and tensors of which ranks have equal parts.
#pragma once

#include <string>

#include "../aot.h"
#include "../collectives.h"

namespace vllm_ms {
namespace aot {

// A group is looked up at every call: a graph may be made before its process joins.
struct NamedGroup {
  std::string name;
  explicit NamedGroup(const Attributes &a) : name(a.text("group")) {}

  Group &joined() const { return group(name); }
  Group &joined(int64_t size) const {
    Group &found = joined();
    require(found.size() == size, "group ", name, " has ", found.size(), " ranks, the graph was made for ", size);
    return found;
  }
  Group &joined(int64_t rank, int64_t size) const {
    Group &found = joined();
    require(found.rank() == rank && found.size() == size, "this is rank ", found.rank(), " of ", found.size(), " in group ",
            name, ", the graph was made for rank ", rank, " of ", size);
    return found;
  }
};

// Elements of the dimensions before `dim`, and from it on.
struct Sides {
  int64_t outer = 1, inner = 1;
  Sides(const Tensor &x, int64_t dim) {
    for (int i = 0; i < x.rank; ++i) (i < dim ? outer : inner) *= x.dim(i);
  }
};

// `size` equal parts along `dim`.
struct PartsAlong {
  int64_t dim, size;
  explicit PartsAlong(const Attributes &a) : dim(a.integer("dim")), size(a.integer("size")) {}

  Shape gathered(const Tensor &x) const {
    Shape shape = checked(x);
    if (shape[dim] >= 0) shape[dim] *= size;
    return shape;
  }
  Shape scattered(const Tensor &x) const {
    Shape shape = checked(x);
    require(shape[dim] < 0 || shape[dim] % size == 0, "dimension ", dim, " of ", shape[dim], " over ", size, " ranks");
    if (shape[dim] >= 0) shape[dim] /= size;
    return shape;
  }
  Sides sides(const Tensor &x) const { return {x, dim}; }

 private:
  Shape checked(const Tensor &x) const {
    require(dim >= 0 && dim < x.rank, "dim ", dim, " of a tensor of rank ", x.rank);
    return x.shape();
  }
};

}  // namespace aot
}  // namespace vllm_ms

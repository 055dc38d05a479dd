// Several operators as one operator of MindSpore, on a CPU all of a step: what passes between them stays in memory of
// ours, and the runtime's work per operator is paid once.
#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>

#include "../aot.h"
#include "../launch_addresses.h"
#include "../parallel.h"
#include "../step_times.h"

namespace vllm_ms {
namespace aot {
namespace {

// What a step's tensor argument is: one of the sequence's inputs or weights, the result of an earlier step, or absent.
struct Operand {
  enum Kind { absent, input, weight, result } kind;
  int index;
};

// A tensor that is not an input of its own: MindSpore takes about a microsecond for each, with cold caches several. Its
// address is in a table that is the sequence's last input; plus kCoded if its type, in columns, is coded (coded.h),
// which depends on its values.
struct FixedTensor {
  static constexpr int64_t kCoded = 1;
  DType dtype;
  Shape shape;
};

struct SequenceStep {
  std::string name, result;
  std::unique_ptr<Step> op;
  std::vector<Operand> operands;
  std::vector<int> last_uses;  // results that no later step reads
};

using Names = std::map<std::string, Operand>;

// One line of the program: `result = operator operands attributes`, an operand (or -) per tensor of the operator's
// schema, attributes as name=value.
SequenceStep parse_step(const std::string &line, const Names &known) {
  std::istringstream words(line);
  SequenceStep step;
  std::string word;
  require(static_cast<bool>(words >> step.result >> word >> step.name) && word == "=", "'", line,
          "', expected 'result = operator ...'");
  const auto type = step_types().find(step.name);
  require(type != step_types().end(), "no operator '", step.name, "'");
  for (int i = 0; i < type->second.tensors; ++i) {
    require(static_cast<bool>(words >> word), step.name, ": ", i, " operands, expected ", type->second.tensors);
    const auto operand = known.find(word);
    require(operand != known.end(), step.name, ": no input or earlier result '", word, "'");
    step.operands.push_back(operand->second);
  }
  Attributes::Values values;
  while (words >> word) {
    const size_t equals = word.find('=');
    require(equals != std::string::npos, step.name, ": '", word, "', expected name=value");
    values[word.substr(0, equals)] = word.substr(equals + 1);
  }
  step.op = type->second.create(Attributes(std::move(values)));
  return step;
}

// The shapes of all steps' results for the inputs' shapes. Kept from launch to launch: most have the shapes of the one
// before, and MindSpore asks for the result's more than once.
struct SequenceShapes {
  std::vector<Shape> inputs, steps;
  std::vector<Tensor> values;  // the steps' results without data
  Shape result;

  bool fit(const Inputs &in) const {
    for (int i = 0; i < in.size(); ++i) {
      const Tensor &t = in[i];
      if (static_cast<size_t>(t.rank) != inputs[i].size() || !std::equal(t.dims, t.dims + t.rank, inputs[i].begin())) {
        return false;
      }
    }
    return true;
  }
};

// The result is that of one step, or those of several, one after the other in one vector: MindSpore's runtime would make
// an operator of its own for what follows the first.
struct SequenceOp {
  static constexpr const char *kName = "sequence";
  std::vector<FixedTensor> weights;
  std::vector<SequenceStep> steps;
  std::vector<int> results;
  int inputs;

  explicit SequenceOp(const Attributes &a) : inputs(0) {
    Names known{{"-", {Operand::absent, 0}}};
    std::istringstream names(a.text("inputs"));
    for (std::string name; names >> name; ++inputs) known[name] = {Operand::input, inputs};
    std::istringstream declarations(a.text("weights"));
    for (std::string line; std::getline(declarations, line);) {
      known[declare_weight(line)] = {Operand::weight, static_cast<int>(weights.size()) - 1};
    }
    std::istringstream lines(a.text("program"));
    for (std::string line; std::getline(lines, line);) {
      if (line.find_first_not_of(' ') == std::string::npos) continue;
      steps.push_back(parse_step(line, known));
      known[steps.back().result] = {Operand::result, static_cast<int>(steps.size()) - 1};
    }
    require(!steps.empty(), "an empty program");
    std::istringstream wanted(a.text("results"));
    for (std::string name; wanted >> name;) {
      const auto operand = known.find(name);
      require(operand != known.end() && operand->second.kind == Operand::result, "no step has the result '", name, "'");
      results.push_back(operand->second.index);
    }
    if (results.empty()) results.push_back(static_cast<int>(steps.size()) - 1);
    std::vector<bool> read(steps.size());
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      for (const Operand &operand : step->operands) {
        if (operand.kind != Operand::result || read[operand.index]) continue;
        read[operand.index] = true;
        step->last_uses.push_back(operand.index);
      }
    }
  }

  Shape infer(const Inputs &in) const { return shapes_of(in)->result; }

  void run(const Inputs &in, void *out) const {
    require_table(in);
    if (addresses_watched()) note_addresses(addresses(in, out));
    const std::shared_ptr<const SequenceShapes> shapes = shapes_of(in);
    std::vector<Tensor> values = shapes->values;
    float *next = static_cast<float *>(out);
    for (int result : results) {
      values[result].data = next;
      next += values[result].numel();
    }
    std::vector<std::optional<Scratch>> memory(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      if (values[i].data == nullptr) {
        values[i].data = memory[i].emplace(values[i].numel() * sizeof(float)).as<float>();
      }
      const StepTimer timer(steps[i].name, shapes->steps[i].back());
      try {
        steps[i].op->run(arguments(i, in, values), values[i].data);
      } catch (const std::invalid_argument &error) {
        fail("step ", i, ", ", steps[i].name, ": ", error.what());
      }
      for (int unused : steps[i].last_uses) memory[unused].reset();
    }
  }

 private:
  // `name dtype dimensions`; returns the name.
  std::string declare_weight(const std::string &line) {
    std::istringstream words(line);
    std::string name, dtype;
    require(static_cast<bool>(words >> name >> dtype), "'", line, "', expected 'name dtype dimensions'");
    FixedTensor weight{parse_dtype(dtype.c_str()), {}};
    require(weight.dtype != DType::other, name, ": no type '", dtype, "'");
    for (int64_t size; words >> size;) weight.shape.push_back(size);
    weights.push_back(std::move(weight));
    return name;
  }

  void require_table(const Inputs &in) const {
    if (weights.empty()) return;
    const Tensor &table = in[inputs - 1];
    require(table.dtype == DType::i64 && table.numel() == static_cast<int64_t>(weights.size()),
            "the last input: expected the addresses of ", weights.size(), " weights as int64");
  }

  Tensor weight(int index, const Inputs &in) const {
    Tensor result;
    result.given = true;
    result.dtype = weights[index].dtype;
    result.rank = static_cast<int>(weights[index].shape.size());
    result.dims = weights[index].shape.data();
    const int64_t *table = in[inputs - 1].as<int64_t>();
    if (table == nullptr) return result;
    result.data = reinterpret_cast<void *>(table[index] & ~FixedTensor::kCoded);
    if (result.dtype == DType::bf16_columns && (table[index] & FixedTensor::kCoded) != 0) result.dtype = DType::bf16_coded;
    return result;
  }

  std::vector<int64_t> addresses(const Inputs &in, void *out) const {
    std::vector<int64_t> found;
    const int tensors = in.size() - (weights.empty() ? 0 : 1);
    for (int i = 0; i < tensors; ++i) found.push_back(reinterpret_cast<int64_t>(in[i].data));
    for (size_t i = 0; i < weights.size(); ++i) found.push_back(reinterpret_cast<int64_t>(weight(i, in).data));
    found.push_back(reinterpret_cast<int64_t>(out));
    return found;
  }

  Inputs arguments(size_t i, const Inputs &in, const std::vector<Tensor> &values) const {
    std::vector<Tensor> tensors;
    for (const Operand &operand : steps[i].operands) {
      if (operand.kind == Operand::absent) tensors.emplace_back();
      if (operand.kind == Operand::input) tensors.push_back(in[operand.index]);
      if (operand.kind == Operand::weight) tensors.push_back(weight(operand.index, in));
      if (operand.kind == Operand::result) tensors.push_back(values[operand.index]);
    }
    return Inputs(std::move(tensors));
  }

  std::shared_ptr<const SequenceShapes> shapes_of(const Inputs &in) const {
    std::shared_ptr<const SequenceShapes> known = std::atomic_load(&last_shapes_);
    if (known == nullptr || !known->fit(in)) {
      known = infer_steps(in);
      std::atomic_store(&last_shapes_, known);
    }
    return known;
  }

  std::shared_ptr<const SequenceShapes> infer_steps(const Inputs &in) const {
    const auto found = std::make_shared<SequenceShapes>();
    for (int i = 0; i < in.size(); ++i) found->inputs.push_back(in[i].shape());
    found->steps.resize(steps.size());
    found->values.resize(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) found->values[i] = infer_step(i, in, found->values, &found->steps[i]);
    found->result = results.size() == 1 ? found->steps[results[0]] : Shape{total(*found)};
    return found;
  }

  // Elements of all results, -1: not known.
  int64_t total(const SequenceShapes &shapes) const {
    int64_t total = 0;
    for (int result : results) {
      const Shape &shape = shapes.steps[result];
      if (std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; })) return -1;
      total += shapes.values[result].numel();
    }
    return total;
  }

  Tensor infer_step(size_t i, const Inputs &in, const std::vector<Tensor> &values, Shape *shape) const {
    try {
      *shape = steps[i].op->infer(arguments(i, in, values));
    } catch (const std::invalid_argument &error) {
      fail("step ", i, ", ", steps[i].name, ": ", error.what());
    }
    Tensor result;
    result.given = true;
    result.dtype = DType::f32;
    result.rank = static_cast<int>(shape->size());
    result.dims = shape->data();
    return result;
  }

  mutable std::shared_ptr<const SequenceShapes> last_shapes_;
};

}  // namespace

// MindSpore infers shapes before every launch, each time from the attributes: a program is parsed once.
template <>
struct Construction<SequenceOp> {
  static std::shared_ptr<const SequenceOp> create(const Attributes &attributes) {
    static std::mutex mutex;
    static std::map<std::string, std::weak_ptr<const SequenceOp>> parsed;
    std::string key;
    for (const char *name : {"inputs", "results", "weights", "program"}) key += attributes.text(name) + '\n';
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<const SequenceOp> op = parsed[key].lock();
    if (op == nullptr) parsed[key] = op = std::make_shared<SequenceOp>(attributes);
    return op;
  }
  static int tensors(const SequenceOp &op) { return op.inputs; }
};

}  // namespace aot
}  // namespace vllm_ms

VLLM_MS_AOT_EXPORTS(Sequence, vllm_ms::aot::SequenceOp)

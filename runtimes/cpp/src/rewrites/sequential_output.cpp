// Guidance and the affine map of one patch, with the noise and the weights of this step given by the caller.
//
// Formula: (a, b) = out[0] + g (out[0] - out[G-1]);  next = z exp(a) + b.
// Pattern: out = Gemm(h, W_out, b_out); between it and `next` only Reshape, Gather, Sub, Split, Mul, Add, Exp and what
//     looks up `guidance` and `noise` by `position`; Exp is of the first half of a Split.
// Rewrite, for S = 1 and all images at one position:
//     one branch:   (a, b) = Split(out)
//     two branches: first, last = Split(out, rows);  (a, b) = Split(first + g (first - last))
//     next [B, D] = z exp(a) + b
// with new inputs `z` [B, D] and, with two branches, `g` [1, 2D]. Without nvp there is no a.
#include <algorithm>

#include "rewrites.hpp"

namespace tarflow::detail {
namespace {

/// The values that the argument of Exp is a sum of must hold the first output of a Split.
void check_exp(const Graph& graph, const onnx::Node& exp) {
  const onnx::Node& argument = graph.producer(input_of(exp, 0));
  const onnx::Strings values = argument.op_type == "Add" ? argument.input : onnx::Strings{input_of(exp, 0)};
  for (const std::string& value : values) {
    const onnx::Node& source = graph.producer(value);
    if (output_of(source) == value && source.op_type == "Split") return;
  }
  throw PatternMismatch(exp.name + " is not of the first half of a Split");
}

/// The projection to (a, b), after a look at every node between it and `next`.
const onnx::Node& last_gemm(const Graph& graph, const Config& config) {
  const std::set<std::string> looked_up = {"guidance", "noise", "position"};
  std::set<const onnx::Node*> gemms;
  std::set<std::string> seen;
  for (onnx::Strings todo = {"next"}; !todo.empty();) {
    const std::string name = std::move(todo.back());
    todo.pop_back();
    if (graph.has_initializer(name) || !seen.insert(name).second) continue;
    const std::set<std::string> inputs = graph.dependencies(name);
    if (std::includes(looked_up.begin(), looked_up.end(), inputs.begin(), inputs.end())) continue;
    const onnx::Node& node = graph.producer(
        name, {"Gemm", "Reshape", "Gather", "Sub", "Split", "Mul", "Add", "Exp", "GatherND", "Unsqueeze", "Cast"});
    if (node.op_type == "Gemm") {
      gemms.insert(&node);
      continue;
    }
    if (node.op_type == "Exp") check_exp(graph, node);
    todo.insert(todo.end(), node.input.begin(), node.input.end());
  }
  if (gemms.size() != 1)
    throw PatternMismatch("next comes from " + std::to_string(gemms.size()) + " projections, expected one");
  const onnx::Node& gemm = **gemms.begin();
  graph.initializer(input_of(gemm, 1), {config.patch_values() * (config.nvp ? 2 : 1), config.width});
  return gemm;
}

}  // namespace

void rewrite_sequential_output(Graph& graph, const Config& config, const StepKind& kind) {
  const std::int64_t values = config.patch_values();
  const std::string batch_axis = "B";
  const onnx::Attribute halves = onnx::attribute("num_outputs", std::int64_t{2});
  std::string out = graph.after_cast(output_of(last_gemm(graph, config)));
  graph.remove({&graph.producer("next", {"Add"})});
  if (kind.branches == 2) {
    graph.add("Split", {out}, {"out_first", "out_last"}, {onnx::attribute("axis", std::int64_t{0}), halves});
    const onnx::Axis rows = kind.windows ? onnx::Axis(batch_axis) : onnx::Axis(std::int64_t{1});
    graph.inputs.push_back(onnx::value("g", onnx::kFloat, {rows, values * (config.nvp ? 2 : 1)}));
    const std::string difference = graph.add("Sub", {"out_first", "out_last"}, {"out_difference"});
    const std::string weighted = graph.add("Mul", {difference, "g"}, {"out_weighted"});
    out = graph.add("Add", {"out_first", weighted}, {"out_guided"});
  }
  graph.inputs.push_back(onnx::value("z", onnx::kFloat, {batch_axis, values}));
  for (onnx::Value& output : graph.outputs) {
    if (output.name == "next") output = onnx::value("next", onnx::kFloat, {batch_axis, values});
  }
  if (!config.nvp) {
    graph.add("Add", {"z", out}, {"next"});
    return;
  }
  graph.add("Split", {out}, {"affine_a", "affine_b"}, {onnx::attribute("axis", std::int64_t{1}), halves});
  const std::string scale = graph.add("Exp", {"affine_a"}, {"affine_scale"});
  const std::string grown = graph.add("Mul", {"z", scale}, {"affine_grown"});
  graph.add("Add", {grown, "affine_b"}, {"next"});
}

SequentialGraph sequential_graph(const onnx::Model& model, const Config& config, const StepKind& kind) {
  Graph graph(model);
  rewrite_attention(graph, config, kind);
  EmbeddingTables tables = rewrite_sequential_input(graph, config);
  rewrite_sequential_output(graph, config, kind);
  return {graph.serialized(), std::move(tables)};
}

}  // namespace tarflow::detail

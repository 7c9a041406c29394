// The gradient graph in two: its forward pass, which also gives z, and the way back from what that pass computed.
//
// The gradient graph recomputes the block's forward pass from the block's input. Where z was not known before, as in
// the score, that pass is the one that yields it: run once instead of twice, two thirds of the arithmetic are left.
#include <algorithm>
#include <unordered_set>

#include "rewrites.hpp"

namespace tarflow::detail {
namespace {

const std::string kCotangent = "cotangent";
const std::string kOrder = "order";

/// Values that do not depend on the cotangent, read by nodes that do.
onnx::Strings saved_of(const Graph& graph) {
  std::unordered_set<std::string> after = {kCotangent};
  std::vector<const onnx::Node*> way_back;
  for (const onnx::Node* node : graph.needed()) {
    const auto is_after = [&](const std::string& name) { return after.count(name) != 0; };
    if (!std::any_of(node->input.begin(), node->input.end(), is_after)) continue;
    after.insert(node->output.begin(), node->output.end());
    way_back.push_back(node);
  }
  onnx::Strings saved;
  std::unordered_set<std::string> seen;
  for (const onnx::Node* node : way_back) {
    for (const std::string& name : node->input) {
      const bool constant = name.empty() || graph.has_initializer(name) || graph.has_input(name);
      if (after.count(name) == 0 && !constant && seen.insert(name).second) saved.push_back(name);
    }
  }
  return saved;
}

/// The two saved values whose product is z in block order: x - b and exp(-a).
onnx::Strings factors_of_z(const Graph& graph, const onnx::Strings& saved) {
  onnx::Strings differences, scales;
  for (const std::string& name : saved) {
    const onnx::Node& node = graph.producer(name);
    if (node.op_type == "Sub") differences.push_back(name);
    if (node.op_type == "Exp" && graph.producer(input_of(node, 0)).op_type == "Neg") scales.push_back(name);
  }
  if (differences.size() != 1 || scales.size() != 1)
    throw PatternMismatch("found " + std::to_string(differences.size()) + " differences and " +
                          std::to_string(scales.size()) + " scales, expected one of each");
  return {differences[0], scales[0]};
}

}  // namespace

SplitGradient split_gradient(const onnx::Model& model) {
  Graph forward(model);
  if (!forward.has_input(kCotangent) || !forward.has_initializer(kOrder))
    throw PatternMismatch("expected an input " + kCotangent + " and an initializer " + kOrder);
  SplitGradient halves;
  halves.saved = saved_of(forward);
  const std::string ordered = forward.add("Mul", factors_of_z(forward, halves.saved), {"z_in_block_order"});
  forward.add("Gather", {ordered, kOrder}, {"z"}, {onnx::attribute("axis", std::int64_t{1})});
  forward.outputs = {onnx::value("z", onnx::kFloat)};
  for (const std::string& name : halves.saved) forward.outputs.push_back(onnx::value(name, onnx::kFloat));

  Graph back(model);
  std::vector<const onnx::Node*> made_before;
  for (const std::string& name : halves.saved) made_before.push_back(&back.producer(name));
  back.remove(made_before);
  back.inputs = {back.input(kCotangent)};
  for (const std::string& name : halves.saved) back.inputs.push_back(onnx::value(name, onnx::kFloat));
  halves.forward = forward.serialized();
  halves.backward = back.serialized();
  if (back.inputs.size() != halves.saved.size() + 1) throw PatternMismatch("the way back reads inputs of the block");
  return halves;
}

}  // namespace tarflow::detail

// The embedding of one patch: everything but the patch itself is looked up by the caller.
//
// Formula: h = W_in x + b_in + pos_embed[position] + class_embed[label].
// Pattern: patches -Reshape-> Gemm(W_in, b_in) -Reshape-> Add(pos_embed gathered at the position)
//     -> Add(class_embed gathered at the labels) or Expand over the branches -Reshape-> h [R, W]
// Rewrite, for S = 1 and all images at one position:
//     h = Add(Gemm(rows [R, D], W_in, b_in), embedding [R, W])
// with new inputs `rows`, the patch once per branch, and `embedding`; the thirty small nodes that made shapes, indices
// and masks from `position` fall away, because nothing reads them any more.
#include "rewrites.hpp"

namespace tarflow::detail {
namespace {

const onnx::Tensor& table(const Graph& graph, const std::string& value, const std::string& input,
                          const onnx::Ints& shape) {
  const onnx::Node& gather = graph.producer(value, {"Gather"});
  if (attribute_of(gather, "axis", std::int64_t{0}) != 0 ||
      graph.dependencies(input_of(gather, 1)) != std::set<std::string>{input})
    throw PatternMismatch(gather.name + " does not look rows up by " + input);
  return graph.initializer(input_of(gather, 0), shape);
}

}  // namespace

EmbeddingTables rewrite_sequential_input(Graph& graph, const Config& config) {
  const onnx::Node& reshape = graph.only("patches", "Reshape");
  const onnx::Node& gemm = graph.consumer(graph.after_cast(output_of(reshape)), {"Gemm"});
  graph.initializer(input_of(gemm, 1), {config.width, config.patch_values()});
  const std::string projected = graph.after_cast(output_of(gemm));
  const onnx::Node& placed = graph.consumer(output_of(graph.consumer(projected, {"Reshape"})), {"Add"});
  EmbeddingTables tables;
  tables.pos_embed = table(graph, input_of(placed, 1), "position", {config.patches(), config.width});
  const onnx::Node* added = nullptr;
  if (config.classes != 0) {
    added = &graph.consumer(output_of(placed), {"Add"});
    const onnx::Node& unsqueeze = graph.producer(input_of(*added, 1), {"Unsqueeze"});
    tables.class_embed = table(graph, input_of(unsqueeze, 0), "labels", {config.classes + 1, config.width});
  } else {
    added = &graph.consumer(output_of(placed), {"Expand"});
  }
  const std::string hidden = output_of(graph.consumer(output_of(*added), {"Reshape"}));

  const std::string rows_axis = "R";
  graph.inputs.push_back(onnx::value("rows", onnx::kFloat, {rows_axis, config.patch_values()}));
  graph.inputs.push_back(onnx::value("embedding", onnx::kFloat, {rows_axis, config.width}));
  graph.replace(output_of(reshape), "rows");
  graph.replace(hidden, graph.add("Add", {projected, "embedding"}, {"embedded"}));
  return tables;
}

}  // namespace tarflow::detail

// Attention over the whole masked cache -> GroupQueryAttention over the part that is written.
//
// Formula: softmax(q K^T / (tau sqrt(E)) + mask) V with K, V the caches after this step's k, v are written.
// Pattern, for each layer:
//     qkv [R, 3W] -Split-> three of (Reshape, Transpose) -> q, k, v [R, H, 1, E]
//     next_key = TensorScatter(key, k, position), next_value likewise
//     MatMul(Mul(q, scale), Transpose(next_key)) -Add(mask)-> Softmax -MatMul(next_value)-> Transpose -> Reshape [R, W]
// Rewrite, for S = 1 (one patch of each row) or for S patches of one image:
//     GroupQueryAttention(Reshape(qkv * [1/tau, 1, 1]), key, value, lengths, total) -> Reshape [R, W]
// The operator reads position + 1 = `lengths` + 1 rows of the caches instead of N masked ones, and writes in place.
// For windows it takes one row at a time: each branch has its own, with caches `key_l`, `value_l` for the first and
// `key_l_null`, `value_l_null` for the second. The temperature stays a factor on q: the columns of `query_factor`
// [R, 3W], which the caller fills, are 1/tau for q and 1 for k and v; without temperature there is no such input.
#include <cmath>

#include "rewrites.hpp"

namespace tarflow::detail {
namespace {

constexpr double kMasked = -1e4;  // what is added to logits that must not count is at most this: exp of it is 0
const onnx::Ints kToColumns = {0, 1, 3, 2};
const onnx::Ints kToHeads = {0, 2, 1, 3};

struct Match {
  std::string qkv, attended;  // the packed projection, and the attended value [R, W]
  std::vector<const onnx::Node*> scatters;
};

const std::string& transposed(const onnx::Node& node, const onnx::Ints& perm) {
  if (attribute_of(node, "perm", onnx::Ints{}) != perm)
    throw PatternMismatch(node.name + " is not the permutation that was expected");
  return output_of(node);
}

/// The mask must be 0 up to the position and a large negative number after it.
void check_mask(const Graph& graph, const std::string& mask) {
  const onnx::Node& where = graph.producer(mask, {"Where"});
  const onnx::Node& visible = graph.producer(input_of(where, 0), {"LessOrEqual"});
  const bool values = graph.number(input_of(where, 1)) == 0.0 && graph.number(input_of(where, 2)) <= kMasked;
  if (!values || !graph.dependencies(input_of(visible, 0)).empty() ||
      graph.dependencies(input_of(visible, 1)) != std::set<std::string>{"position"})
    throw PatternMismatch(where.name + " does not mask what lies after the position");
}

/// The factor on q must be 1/(tau sqrt(E)), spread over the rows.
void check_scale(const Graph& graph, const std::string& scale, const Config& config) {
  const onnx::Node* node = &graph.producer(scale);
  for (int links = 0; links < 8 && (node->op_type == "Cast" || node->op_type == "Reshape" ||
                                    node->op_type == "Expand" || node->op_type == "Unsqueeze");
       ++links)
    node = &graph.producer(input_of(*node, 0));
  const double expected = std::pow(static_cast<double>(config.head_dim), -0.5);
  const bool is_product = node->op_type == "Mul" && input_of(*node, 0) == "inverse_temperature";
  if (!is_product || !(std::fabs(graph.number(input_of(*node, 1)) - expected) <= 1e-6 * expected))
    throw PatternMismatch(node->name + " is not 1/(tau sqrt(E))");
}

/// Back from [R, H, S, E] to the third of the packed projection that it is.
const std::string& split_output(const Graph& graph, const std::string& heads) {
  const onnx::Node& transpose = graph.producer(heads, {"Transpose"});
  transposed(transpose, kToHeads);
  return input_of(graph.producer(input_of(transpose, 0), {"Reshape"}), 0);
}

void check_scatter(const Graph& graph, const onnx::Node& scatter, const std::string& cache) {
  const std::int64_t axis = attribute_of(scatter, "axis", std::int64_t{-2});
  const bool linear = attribute_of(scatter, "mode", std::string("linear")) == "linear" && (axis == -2 || axis == 2);
  if (input_of(scatter, 0) != cache || !linear ||
      graph.dependencies(input_of(scatter, 2)) != std::set<std::string>{"position"})
    throw PatternMismatch(scatter.name + " does not write " + cache + " at the position");
}

Match match(const Graph& graph, const Config& config, const std::string& layer) {
  const std::string key = "next_key_" + layer, value = "next_value_" + layer;
  const onnx::Node& key_scatter = graph.producer(key, {"TensorScatter"});
  const onnx::Node& value_scatter = graph.producer(value, {"TensorScatter"});
  check_scatter(graph, key_scatter, "key_" + layer);
  check_scatter(graph, value_scatter, "value_" + layer);
  const onnx::Node& logits = graph.consumer(transposed(graph.consumer(key, {"Transpose"}), kToColumns), {"MatMul"});
  const onnx::Node& scaled = graph.producer(input_of(logits, 0), {"Mul"});
  check_scale(graph, input_of(scaled, 1), config);
  const onnx::Node& masked = graph.consumer(graph.after_cast(output_of(logits)), {"Add"});
  check_mask(graph, input_of(masked, 1));
  const onnx::Node& softmax = graph.consumer(output_of(masked), {"Softmax"});
  const std::int64_t axis = attribute_of(softmax, "axis", std::int64_t{-1});
  if (axis != -1 && axis != 3) throw PatternMismatch(softmax.name + " is not over the last axis");
  const std::string weights = graph.after_cast(output_of(softmax));
  const onnx::Node& mixed = graph.consumer(weights, {"MatMul"});
  if (mixed.input != onnx::Strings{weights, value})
    throw PatternMismatch(mixed.name + " does not multiply the weights with " + value);
  const std::string& merged = transposed(graph.consumer(output_of(mixed), {"Transpose"}), kToHeads);
  const onnx::Strings thirds = {split_output(graph, input_of(scaled, 0)), split_output(graph, input_of(key_scatter, 1)),
                                split_output(graph, input_of(value_scatter, 1))};
  const onnx::Node& split = graph.producer(thirds[0], {"Split"});
  const std::int64_t along = attribute_of(split, "axis", std::int64_t{0});
  if ((along != 1 && along != -1) || split.output != thirds || split.input.size() != 1)
    throw PatternMismatch(split.name + " does not split q, k and v");
  graph.initializer(input_of(graph.producer(split.input[0], {"Gemm"}), 1), {3 * config.width, config.width});
  return {split.input[0], output_of(graph.consumer(merged, {"Reshape"})), {&key_scatter, &value_scatter}};
}

/// GroupQueryAttention of `qkv` [., 3W], seen as `rows` = (R, S), over the caches of that suffix -> [., W].
std::string attend(Graph& graph, const Config& config, const std::string& qkv, std::int64_t rows, std::int64_t patches,
                   const std::string& suffix) {
  const std::string packed =
      graph.add("Reshape", {qkv, graph.shape({rows, patches, 3 * config.width})}, {"packed_qkv_" + suffix});
  const std::string key = "key_" + suffix, value = "value_" + suffix;
  const auto scale = static_cast<float>(std::pow(static_cast<double>(config.head_dim), -0.5));
  const std::string out = graph.add(
      "GroupQueryAttention", {packed, "", "", key, value, "lengths", "total"},
      {"attended_" + suffix, "next_" + key, "next_" + value},
      {onnx::attribute("num_heads", config.heads()), onnx::attribute("kv_num_heads", config.heads()),
       onnx::attribute("scale", scale)},
      "com.microsoft");
  return graph.add("Reshape", {out, graph.shape({-1, config.width})}, {"flat_attended_" + suffix});
}

/// Declare the caches of the second branch like those of the first.
void declare_second_caches(Graph& graph, const std::string& layer) {
  for (const std::string& name : {"key_" + layer, "value_" + layer}) {
    graph.inputs.push_back({name + kNullBranch, graph.input(name).type, ""});
    for (std::size_t i = 0; i < graph.outputs.size(); ++i) {
      if (graph.outputs[i].name != "next_" + name) continue;
      graph.outputs.push_back({"next_" + name + kNullBranch, graph.outputs[i].type, ""});
      break;
    }
  }
}

}  // namespace

void rewrite_attention(Graph& graph, const Config& config, const StepKind& kind) {
  const std::string rows_axis = "R";
  graph.inputs.push_back(onnx::value("lengths", onnx::kInt32, {rows_axis}));
  graph.inputs.push_back(onnx::value("total", onnx::kInt32, {std::int64_t{1}}));
  for (std::int64_t number = 0; number < config.layers; ++number) {
    const std::string layer = std::to_string(number);
    const Match found = match(graph, config, layer);
    std::string packed = found.qkv;
    if (kind.temperature) {
      if (!graph.has_input("query_factor")) {
        const std::int64_t type = onnx::elem_type(graph.input("key_0"));
        graph.inputs.push_back(onnx::value("query_factor", type, {rows_axis, 3 * config.width}));
      }
      packed = graph.add("Mul", {packed, "query_factor"}, {"scaled_qkv_" + layer});
    }
    graph.remove(found.scatters);
    std::string flat;
    if (kind.windows && kind.branches == 2) {
      const std::string first = "qkv_" + layer, second = first + kNullBranch;
      graph.add("Split", {packed}, {first, second},
                {onnx::attribute("axis", std::int64_t{0}), onnx::attribute("num_outputs", std::int64_t{2})});
      declare_second_caches(graph, layer);
      const onnx::Strings rows = {attend(graph, config, first, 1, -1, layer),
                                  attend(graph, config, second, 1, -1, layer + kNullBranch)};
      flat = graph.add("Concat", rows, {"attended_rows_" + layer}, {onnx::attribute("axis", std::int64_t{0})});
    } else {
      flat = kind.windows ? attend(graph, config, packed, 1, -1, layer) : attend(graph, config, packed, -1, 1, layer);
    }
    graph.replace(found.attended, flat);
  }
}

}  // namespace tarflow::detail

// Graph: an ONNX graph with the look-ups a rewrite needs. PatternMismatch: how a rewrite declines.
#pragma once

#include <deque>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../onnx.hpp"

namespace tarflow::detail {

/// The graph is not of the form that a rewrite knows: the portable graph runs instead.
struct PatternMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A rewrite adds nodes in any order and redirects readers with `replace`; `serialized` keeps what the outputs need.
class Graph {
 public:
  using Node = onnx::Node;
  using Ops = std::initializer_list<const char*>;

  explicit Graph(onnx::Model model);
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  std::vector<onnx::Value> inputs, outputs;

  /// The node that makes `value`, which must be one of `ops` when any are given.
  Node& producer(const std::string& value, Ops ops = {}) const;
  bool has_producer(const std::string& value) const { return producers_.count(value) != 0; }
  /// All nodes that read `value`.
  std::vector<Node*> consumers(const std::string& value) const;
  /// The only node that reads `value`, which must be one of `ops` when any are given.
  Node& consumer(const std::string& value, Ops ops = {}) const;
  /// The only node of `op` among the readers of `value`.
  Node& only(const std::string& value, const std::string& op) const;
  /// `value`, or the Cast of it when that is its only reader: float16 bundles cast around linear layers.
  std::string after_cast(const std::string& value) const;
  bool has_input(const std::string& name) const;
  const onnx::Value& input(const std::string& name) const;
  bool has_initializer(const std::string& name) const { return places_.count(name) != 0; }
  /// The initializer `name`, which must have this shape.
  const onnx::Tensor& initializer(const std::string& name, const onnx::Ints& shape) const;
  /// The value of a constant of one element that lies in the model; NaN for anything else.
  double number(const std::string& name) const;
  /// The graph inputs that the numbers in `value` depend on; inputs that give only a shape do not count.
  std::set<std::string> dependencies(const std::string& value) const;

  /// Append a node; returns its first output.
  std::string add(const std::string& op_type, onnx::Strings node_inputs, onnx::Strings node_outputs,
                  std::vector<onnx::Attribute> attributes = {}, const std::string& domain = "");
  /// An int64 constant for Reshape, made once; returns its name.
  std::string shape(const onnx::Ints& dims);
  /// Let every reader of `old` read `new`.
  void replace(const std::string& old, const std::string& with);
  /// Drop nodes, so that others may make what they made.
  void remove(const std::vector<const Node*>& nodes);

  /// The nodes that the outputs need, each after the nodes that it reads.
  std::vector<Node*> needed() const;
  /// The model as bytes, without the nodes, initializers and inputs that nothing needs.
  std::string serialized();

 private:
  void index();

  onnx::Model model_;       // its lists are moved into the members below
  std::deque<Node> store_;  // nodes keep their place
  std::vector<Node*> nodes_;
  std::vector<onnx::Tensor> initializers_;
  std::unordered_map<std::string, std::size_t> places_;  // of the initializers
  std::unordered_map<std::string, Node*> producers_;
  std::unordered_map<std::string, std::vector<Node*>> consumers_;
};

/// An input or output of a node that a pattern expects to be there.
inline const std::string& input_of(const onnx::Node& node, std::size_t place) {
  if (place >= node.input.size()) throw PatternMismatch(node.name + " has too few inputs");
  return node.input[place];
}
inline const std::string& output_of(const onnx::Node& node, std::size_t place = 0) {
  if (place >= node.output.size()) throw PatternMismatch(node.name + " has too few outputs");
  return node.output[place];
}

/// The value of a node's attribute, or `otherwise` when it has none of that kind.
template <typename T>
T attribute_of(const onnx::Node& node, const std::string& name, T otherwise) {
  for (const onnx::Attribute& entry : node.attributes) {
    if (entry.name != name) continue;
    const std::optional<T>& value = entry.value<T>();
    if (!value) throw PatternMismatch(node.name + " has a " + name + " of another type");
    return *value;
  }
  return otherwise;
}

}  // namespace tarflow::detail

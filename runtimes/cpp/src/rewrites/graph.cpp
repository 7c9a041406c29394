#include "graph.hpp"

#include <algorithm>
#include <limits>
#include <unordered_set>

namespace tarflow::detail {
namespace {

bool is_one_of(const onnx::Node& node, Graph::Ops ops) {
  return ops.size() == 0 ||
         (node.domain.empty() && std::find(ops.begin(), ops.end(), node.op_type) != ops.end());
}

std::string words(Graph::Ops ops, const char* otherwise) {
  std::string text;
  for (const char* op : ops) text += (text.empty() ? "" : " or ") + std::string(op);
  return text.empty() ? otherwise : text;
}

}  // namespace

Graph::Graph(onnx::Model model)
    : inputs(std::move(model.inputs)), outputs(std::move(model.outputs)), initializers_(std::move(model.initializers)) {
  for (Node& node : model.nodes) nodes_.push_back(&store_.emplace_back(std::move(node)));
  for (std::size_t i = 0; i < initializers_.size(); ++i) places_[initializers_[i].name] = i;
  model_.graph_rest = std::move(model.graph_rest);
  model_.domains = std::move(model.domains);
  model_.rest = std::move(model.rest);
  index();
}

void Graph::index() {
  producers_.clear();
  consumers_.clear();
  for (Node* node : nodes_) {
    for (const std::string& name : node->output) {
      if (!name.empty()) producers_[name] = node;
    }
    for (const std::string& name : node->input) {
      std::vector<Node*>& readers = consumers_[name];
      if (readers.empty() || readers.back() != node) readers.push_back(node);
    }
  }
}

Graph::Node& Graph::producer(const std::string& value, Ops ops) const {
  const auto found = producers_.find(value);
  if (found != producers_.end() && is_one_of(*found->second, ops)) return *found->second;
  throw PatternMismatch(value + " comes from " + (found == producers_.end() ? "no node" : found->second->op_type) +
                        ", expected " + words(ops, "a node"));
}

std::vector<Graph::Node*> Graph::consumers(const std::string& value) const {
  const auto found = consumers_.find(value);
  return found == consumers_.end() ? std::vector<Node*>{} : found->second;
}

Graph::Node& Graph::consumer(const std::string& value, Ops ops) const {
  const std::vector<Node*> nodes = consumers(value);
  if (nodes.size() == 1 && is_one_of(*nodes[0], ops)) return *nodes[0];
  std::string found;
  for (const Node* node : nodes) found += (found.empty() ? "" : ", ") + node->op_type;
  throw PatternMismatch(value + " is read by " + (found.empty() ? "nothing" : found) + ", expected one " +
                        words(ops, "node"));
}

Graph::Node& Graph::only(const std::string& value, const std::string& op) const {
  std::vector<Node*> nodes = consumers(value);
  nodes.erase(std::remove_if(nodes.begin(), nodes.end(), [&](const Node* node) { return node->op_type != op; }),
              nodes.end());
  if (nodes.size() != 1)
    throw PatternMismatch(value + " is read by " + std::to_string(nodes.size()) + " " + op + " nodes, expected one");
  return *nodes[0];
}

std::string Graph::after_cast(const std::string& value) const {
  const std::vector<Node*> nodes = consumers(value);
  return nodes.size() == 1 && nodes[0]->op_type == "Cast" && !nodes[0]->output.empty() ? nodes[0]->output[0] : value;
}

bool Graph::has_input(const std::string& name) const {
  return std::any_of(inputs.begin(), inputs.end(), [&](const onnx::Value& one) { return one.name == name; });
}

const onnx::Value& Graph::input(const std::string& name) const {
  for (const onnx::Value& one : inputs) {
    if (one.name == name) return one;
  }
  throw PatternMismatch("there is no input " + name);
}

const onnx::Tensor& Graph::initializer(const std::string& name, const onnx::Ints& shape) const {
  const auto found = places_.find(name);
  if (found != places_.end() && initializers_[found->second].dims == shape) return initializers_[found->second];
  std::string axes;
  for (const std::int64_t length : shape) axes += (axes.empty() ? "" : ", ") + std::to_string(length);
  throw PatternMismatch(name + ": expected an initializer of shape [" + axes + "]");
}

double Graph::number(const std::string& name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? std::numeric_limits<double>::quiet_NaN()
                                : onnx::number(initializers_[found->second]);
}

std::set<std::string> Graph::dependencies(const std::string& value) const {
  std::set<std::string> found;
  std::unordered_set<std::string> seen;
  std::vector<std::string> todo = {value};
  while (!todo.empty()) {
    const std::string name = std::move(todo.back());
    todo.pop_back();
    if (!seen.insert(name).second) continue;
    if (has_input(name)) {
      found.insert(name);
      continue;
    }
    const auto made = producers_.find(name);
    if (made != producers_.end() && made->second->op_type != "Shape")
      todo.insert(todo.end(), made->second->input.begin(), made->second->input.end());
  }
  return found;
}

std::string Graph::add(const std::string& op_type, onnx::Strings node_inputs, onnx::Strings node_outputs,
                       std::vector<onnx::Attribute> attributes, const std::string& domain) {
  Node* node = &store_.emplace_back(
      onnx::node(op_type, std::move(node_inputs), std::move(node_outputs), std::move(attributes), domain));
  nodes_.push_back(node);
  for (const std::string& name : node->output) producers_[name] = node;
  for (const std::string& name : node->input) {
    std::vector<Node*>& readers = consumers_[name];
    if (readers.empty() || readers.back() != node) readers.push_back(node);
  }
  return node->output[0];
}

std::string Graph::shape(const onnx::Ints& dims) {
  std::string name = "shape";
  for (const std::int64_t length : dims) name += "_" + std::to_string(length);
  if (!has_initializer(name)) {
    places_[name] = initializers_.size();
    initializers_.push_back(onnx::tensor(name, dims));
  }
  return name;
}

void Graph::replace(const std::string& old, const std::string& with) {
  for (Node* node : consumers(old)) std::replace(node->input.begin(), node->input.end(), old, with);
  index();
}

void Graph::remove(const std::vector<const Node*>& nodes) {
  const auto gone = [&](const Node* node) { return std::find(nodes.begin(), nodes.end(), node) != nodes.end(); };
  nodes_.erase(std::remove_if(nodes_.begin(), nodes_.end(), gone), nodes_.end());
  index();
}

std::vector<Graph::Node*> Graph::needed() const {
  std::vector<Node*> ordered;
  std::unordered_set<const Node*> done, entered;
  std::vector<std::pair<Node*, bool>> stack;  // explicit: deep models would exhaust the thread's
  const auto push = [&](const std::string& name) {
    const auto found = producers_.find(name);
    if (found != producers_.end()) stack.emplace_back(found->second, false);
  };
  for (auto output = outputs.rbegin(); output != outputs.rend(); ++output) push(output->name);
  while (!stack.empty()) {
    const auto [node, inputs_done] = stack.back();
    stack.pop_back();
    if (done.count(node) != 0) continue;
    if (inputs_done) {
      done.insert(node);
      ordered.push_back(node);
      continue;
    }
    if (!entered.insert(node).second) throw PatternMismatch(node->name + " reads what it makes");
    stack.emplace_back(node, true);
    for (auto name = node->input.rbegin(); name != node->input.rend(); ++name) push(*name);
  }
  return ordered;
}

std::string Graph::serialized() {
  onnx::Model kept;
  kept.graph_rest = model_.graph_rest;
  kept.domains = model_.domains;
  kept.rest = model_.rest;
  std::unordered_set<std::string> read;
  for (const Node* node : needed()) {
    kept.nodes.push_back(*node);
    read.insert(node->input.begin(), node->input.end());
  }
  for (const onnx::Tensor& one : initializers_) {
    if (read.count(one.name) != 0) kept.initializers.push_back(one);
  }
  for (const onnx::Value& one : inputs) {
    if (read.count(one.name) != 0) kept.inputs.push_back(one);
  }
  kept.outputs = outputs;
  const bool contributed = std::any_of(kept.nodes.begin(), kept.nodes.end(),
                                       [](const Node& node) { return node.domain == "com.microsoft"; });
  if (contributed && kept.domains.count("com.microsoft") == 0) onnx::import_domain(kept, "com.microsoft", 1);
  inputs = kept.inputs;
  return onnx::serialize(kept);
}

}  // namespace tarflow::detail

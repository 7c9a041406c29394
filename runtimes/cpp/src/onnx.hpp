// The part of the ONNX file format that the load-time rewrites read and write. What a rewrite does not touch is kept as
// the bytes that it came in. Source: onnx/onnx.proto; the wire format of protocol buffers.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace tarflow::detail::onnx {

/// TensorProto.DataType.
enum : std::int64_t { kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };

using Ints = std::vector<std::int64_t>;
using Strings = std::vector<std::string>;

/// A node's attribute; one of `values` is set, or none for the kinds that no rewrite reads. It is no variant, because
/// libstdc++ 12 does not survive a copy of one that runs out of memory.
struct Attribute {
  std::string bytes;
  std::string name;
  std::tuple<std::optional<float>, std::optional<std::int64_t>, std::optional<std::string>, std::optional<Ints>> values;

  template <typename T>
  std::optional<T>& value() { return std::get<std::optional<T>>(values); }
  template <typename T>
  const std::optional<T>& value() const { return std::get<std::optional<T>>(values); }
};

struct Node {
  Strings input, output;
  std::string name, op_type, domain;
  std::vector<Attribute> attributes;
  std::string rest;  // fields without a name here
};

/// An initializer; never changed, so that its bytes are kept whole.
struct Tensor {
  std::string bytes;
  std::string name;
  Ints dims;
  std::int64_t data_type = 0;
  bool external = false;
  std::vector<std::pair<std::string, std::string>> external_data;
  std::string raw_data;
  std::vector<float> float_data;
  Ints int64_data;
};

/// A graph input or output; `type` is a serialised TypeProto.
struct Value {
  std::string name, type;
  std::string rest;
};

struct Model {
  std::vector<Node> nodes;
  std::vector<Tensor> initializers;
  std::vector<Value> inputs, outputs;
  std::string graph_rest;        // the graph's other fields, without value_info: rewrites would make it wrong
  std::set<std::string> domains;  // of the imported operator sets
  std::string rest;
};

/// Throws Error (TARFLOW_ERROR_BUNDLE) when `data` is no ONNX model; `where` names the file.
Model parse_model(const std::string& data, const std::string& where);

std::string serialize(const Model& model);

/// Refuse a model whose tensors lie anywhere but in the file `weights`, beside it. Throws Error (BUNDLE).
void check_external_data(const Model& model, const std::string& weights, const std::string& where);

/// Add an operator set to the model's imports.
void import_domain(Model& model, const std::string& domain, std::int64_t version);

Attribute attribute(const std::string& name, float value);
Attribute attribute(const std::string& name, std::int64_t value);
Node node(const std::string& op_type, Strings inputs, Strings outputs, std::vector<Attribute> attributes = {},
          const std::string& domain = "");

/// A graph input or output; axes are numbers or letters.
using Axis = std::variant<std::int64_t, std::string>;
Value value(const std::string& name, std::int64_t elem_type, const std::vector<Axis>& shape);
/// The same without a shape: even the number of axes is open.
Value value(const std::string& name, std::int64_t elem_type);
/// The element type of a value that is a tensor, else 0.
std::int64_t elem_type(const Value& value);

/// An int64 initializer [count].
Tensor tensor(const std::string& name, const Ints& values);

/// The only element of a constant that lies in the model; NaN, equal to nothing, for anything else.
double number(const Tensor& tensor);

/// The contents of a float32 initializer that lies in the file `weights`. Throws Error (TARFLOW_ERROR_ENGINE).
std::vector<float> external_floats(const Tensor& tensor, const std::string& weights);

}  // namespace tarflow::detail::onnx

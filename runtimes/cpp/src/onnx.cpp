#include "onnx.hpp"

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>

#include "error.hpp"
#include "wire.hpp"

namespace tarflow::detail::onnx {
namespace {

using wire::Field;
using wire::Reader;

/// A repeated int64, packed or not.
void add_integers(Ints& list, const Field& field) {
  if (field.type != wire::kBytes) {
    list.push_back(static_cast<std::int64_t>(field.integer));
    return;
  }
  for (Reader packed(field.bytes); !packed.at_end();) list.push_back(static_cast<std::int64_t>(packed.varint()));
}

void add_floats(std::vector<float>& list, const Field& field) {
  if (field.type != wire::kBytes) {
    list.push_back(field.real());
    return;
  }
  for (Reader packed(field.bytes); !packed.at_end();) {
    Field one;
    one.integer = packed.fixed(4);
    list.push_back(one.real());
  }
}

Attribute read_attribute(std::string_view message) {
  Attribute made;
  made.bytes = std::string(message);
  std::int64_t type = 0;
  std::int64_t i = 0;
  float f = 0.0F;
  std::string s;
  Ints ints;
  Field field;
  for (Reader reader(message); reader.next(field);) {
    switch (field.number) {
      case 1: made.name = field.text(); break;
      case 2: f = field.real(); break;
      case 3: i = static_cast<std::int64_t>(field.integer); break;
      case 4: s = field.text(); break;
      case 8: add_integers(ints, field); break;
      case 20: type = static_cast<std::int64_t>(field.integer); break;
      default: break;
    }
  }
  if (type == 1) made.value<float>() = f;
  if (type == 2) made.value<std::int64_t>() = i;
  if (type == 3) made.value<std::string>() = std::move(s);
  if (type == 7) made.value<Ints>() = std::move(ints);
  return made;
}

Node read_node(std::string_view message) {
  Node made;
  Field field;
  for (Reader reader(message); reader.next(field);) {
    switch (field.number) {
      case 1: made.input.push_back(field.text()); break;
      case 2: made.output.push_back(field.text()); break;
      case 3: made.name = field.text(); break;
      case 4: made.op_type = field.text(); break;
      case 5: made.attributes.push_back(read_attribute(field.bytes)); break;
      case 7: made.domain = field.text(); break;
      default: made.rest.append(field.whole);
    }
  }
  return made;
}

std::pair<std::string, std::string> read_entry(std::string_view message) {
  std::pair<std::string, std::string> entry;
  Field field;
  for (Reader reader(message); reader.next(field);) {
    if (field.number == 1) entry.first = field.text();
    if (field.number == 2) entry.second = field.text();
  }
  return entry;
}

Tensor read_tensor(std::string_view message) {
  Tensor made;
  made.bytes = std::string(message);
  Field field;
  for (Reader reader(message); reader.next(field);) {
    switch (field.number) {
      case 1: add_integers(made.dims, field); break;
      case 2: made.data_type = static_cast<std::int64_t>(field.integer); break;
      case 4: add_floats(made.float_data, field); break;
      case 7: add_integers(made.int64_data, field); break;
      case 8: made.name = field.text(); break;
      case 9: made.raw_data = field.text(); break;
      case 13: made.external_data.push_back(read_entry(field.bytes)); break;
      case 14: made.external = field.integer == 1; break;
      default: break;
    }
  }
  return made;
}

Value read_value(std::string_view message) {
  Value made;
  Field field;
  for (Reader reader(message); reader.next(field);) {
    switch (field.number) {
      case 1: made.name = field.text(); break;
      case 2: made.type = field.text(); break;
      default: made.rest.append(field.whole);
    }
  }
  return made;
}

void read_graph(Model& model, std::string_view message) {
  Field field;
  for (Reader reader(message); reader.next(field);) {
    switch (field.number) {
      case 1: model.nodes.push_back(read_node(field.bytes)); break;
      case 5: model.initializers.push_back(read_tensor(field.bytes)); break;
      case 11: model.inputs.push_back(read_value(field.bytes)); break;
      case 12: model.outputs.push_back(read_value(field.bytes)); break;
      case 13: break;
      default: model.graph_rest.append(field.whole);
    }
  }
}

std::string written(const Node& node) {
  std::string out;
  for (const std::string& name : node.input) wire::put_bytes(out, 1, name);
  for (const std::string& name : node.output) wire::put_bytes(out, 2, name);
  wire::put_bytes(out, 3, node.name);
  wire::put_bytes(out, 4, node.op_type);
  for (const Attribute& entry : node.attributes) wire::put_bytes(out, 5, entry.bytes);
  if (!node.domain.empty()) wire::put_bytes(out, 7, node.domain);
  return out + node.rest;
}

std::string written(const Value& value) {
  std::string out;
  wire::put_bytes(out, 1, value.name);
  wire::put_bytes(out, 2, value.type);
  return out + value.rest;
}

/// An AttributeProto: its name, the field that holds the value, its type.
Attribute made_attribute(const std::string& name, const std::string& field, std::int64_t type) {
  Attribute made;
  made.name = name;
  wire::put_bytes(made.bytes, 1, name);
  made.bytes += field;
  wire::put_integer(made.bytes, 20, type);
  return made;
}

std::string tensor_type(std::int64_t elem_type, const std::string& shape) {
  std::string tensor;
  wire::put_integer(tensor, 1, elem_type);
  tensor += shape;
  std::string type;
  wire::put_bytes(type, 1, tensor);
  return type;
}

}  // namespace

Model parse_model(const std::string& data, const std::string& where) {
  const char* hint = "export the checkpoint again";
  Model model;
  try {
    Field field;
    for (Reader reader(data); reader.next(field);) {
      if (field.number == 7) {
        read_graph(model, field.bytes);
        continue;
      }
      if (field.number == 8) model.domains.insert(read_entry(field.bytes).first);
      model.rest.append(field.whole);
    }
  } catch (const wire::Malformed& error) {
    throw bundle_error(where + " is not an ONNX model: " + error.what(), hint);
  }
  if (model.nodes.empty()) throw bundle_error(where + " is not an ONNX model: it has no nodes", hint);
  return model;
}

std::string serialize(const Model& model) {
  std::string graph;
  for (const Node& one : model.nodes) wire::put_bytes(graph, 1, written(one));
  for (const Tensor& one : model.initializers) wire::put_bytes(graph, 5, one.bytes);
  for (const Value& one : model.inputs) wire::put_bytes(graph, 11, written(one));
  for (const Value& one : model.outputs) wire::put_bytes(graph, 12, written(one));
  std::string out;
  wire::put_bytes(out, 7, graph + model.graph_rest);
  return out + model.rest;
}

void check_external_data(const Model& model, const std::string& weights, const std::string& where) {
  for (const Tensor& one : model.initializers) {
    std::set<std::string> places;
    for (const auto& [key, place] : one.external_data) {
      if (key == "location") places.insert(place);
    }
    if (!one.external || places == std::set<std::string>{weights}) continue;
    std::string named;
    for (const std::string& place : places) named += (named.empty() ? "" : ", ") + place;
    throw bundle_error(where + ": tensor " + one.name + " lies in " + (named.empty() ? "no file" : named) +
                           ", expected " + weights,
                       "do not use this bundle; fetch it from its source");
  }
}

void import_domain(Model& model, const std::string& domain, std::int64_t version) {
  std::string entry;
  wire::put_bytes(entry, 1, domain);
  wire::put_integer(entry, 2, version);
  wire::put_bytes(model.rest, 8, entry);
  model.domains.insert(domain);
}

Attribute attribute(const std::string& name, float value) {
  std::string field;
  wire::put_float(field, 2, value);
  Attribute made = made_attribute(name, field, 1);
  made.value<float>() = value;
  return made;
}

Attribute attribute(const std::string& name, std::int64_t value) {
  std::string field;
  wire::put_integer(field, 3, value);
  Attribute made = made_attribute(name, field, 2);
  made.value<std::int64_t>() = value;
  return made;
}

Node node(const std::string& op_type, Strings inputs, Strings outputs, std::vector<Attribute> attributes,
          const std::string& domain) {
  Node made;
  made.op_type = op_type;
  made.name = op_type + ":" + outputs.front();
  made.input = std::move(inputs);
  made.output = std::move(outputs);
  made.attributes = std::move(attributes);
  made.domain = domain;
  return made;
}

Value value(const std::string& name, std::int64_t elem_type, const std::vector<Axis>& shape) {
  std::string dims;
  for (const Axis& axis : shape) {
    std::string dim;
    if (const auto* letter = std::get_if<std::string>(&axis))
      wire::put_bytes(dim, 2, *letter);
    else
      wire::put_integer(dim, 1, std::get<std::int64_t>(axis));
    wire::put_bytes(dims, 1, dim);
  }
  std::string field;
  wire::put_bytes(field, 2, dims);
  return {name, tensor_type(elem_type, field), ""};
}

Value value(const std::string& name, std::int64_t elem_type) { return {name, tensor_type(elem_type, ""), ""}; }

std::int64_t elem_type(const Value& value) {
  try {
    Field type;
    for (Reader reader(value.type); reader.next(type);) {
      Field field;
      if (type.number != 1) continue;
      for (Reader tensor(type.bytes); tensor.next(field);) {
        if (field.number == 1) return static_cast<std::int64_t>(field.integer);
      }
    }
  } catch (const wire::Malformed&) {  // no type that a rewrite knows
  }
  return 0;
}

Tensor tensor(const std::string& name, const Ints& values) {
  Tensor made;
  made.name = name;
  made.dims = {static_cast<std::int64_t>(values.size())};
  made.data_type = kInt64;
  for (const std::int64_t number : values) {
    for (int shift = 0; shift < 64; shift += 8)
      made.raw_data.push_back(static_cast<char>(static_cast<std::uint64_t>(number) >> shift));
  }
  wire::put_integer(made.bytes, 1, made.dims[0]);
  wire::put_integer(made.bytes, 2, made.data_type);
  wire::put_bytes(made.bytes, 8, name);
  wire::put_bytes(made.bytes, 9, made.raw_data);
  return made;
}

double number(const Tensor& tensor) {
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  for (const std::int64_t length : tensor.dims) {
    if (length != 1) return kNone;
  }
  if (tensor.external) return kNone;
  if (tensor.data_type == kFloat) {
    float single = 0.0F;
    if (tensor.raw_data.size() == sizeof single) std::memcpy(&single, tensor.raw_data.data(), sizeof single);
    else if (tensor.raw_data.empty() && tensor.float_data.size() == 1) single = tensor.float_data[0];
    else return kNone;
    return static_cast<double>(single);
  }
  if (tensor.data_type == kInt64) {
    std::int64_t whole = 0;
    if (tensor.raw_data.size() == sizeof whole) std::memcpy(&whole, tensor.raw_data.data(), sizeof whole);
    else if (tensor.raw_data.empty() && tensor.int64_data.size() == 1) whole = tensor.int64_data[0];
    else return kNone;
    return static_cast<double>(whole);
  }
  if (tensor.data_type == kFloat16 && tensor.raw_data.size() == 2) {
    const unsigned bits = static_cast<unsigned char>(tensor.raw_data[0]) |
                          static_cast<unsigned>(static_cast<unsigned char>(tensor.raw_data[1])) << 8;
    const int exponent = static_cast<int>(bits >> 10 & 31U);
    const auto fraction = static_cast<double>(bits & 1023U);
    if (exponent == 31 && fraction != 0.0) return kNone;
    const double size = exponent == 31  ? std::numeric_limits<double>::infinity()
                        : exponent == 0  ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024.0, exponent - 25);
    return (bits & 0x8000U) != 0 ? -size : size;
  }
  return kNone;
}

std::vector<float> external_floats(const Tensor& tensor, const std::string& weights) {
  const auto refuse = [&] {
    return engine_error("tensor " + tensor.name + " cannot be read from " + weights.substr(weights.rfind('/') + 1));
  };
  std::string location, offset = "0";
  for (const auto& [key, place] : tensor.external_data) {
    if (key == "location") location = place;
    if (key == "offset") offset = place;
  }
  const bool digits = !offset.empty() && offset.size() < 19 && offset.find_first_not_of("0123456789") == offset.npos;
  if (!tensor.external || tensor.data_type != kFloat || location != weights.substr(weights.rfind('/') + 1) || !digits)
    throw refuse();
  std::size_t count = 1;
  for (const std::int64_t length : tensor.dims) {
    if (length < 0 || (length > 0 && count > (std::size_t{1} << 40) / static_cast<std::size_t>(length))) throw refuse();
    count *= static_cast<std::size_t>(length);
  }
  std::ifstream file(weights, std::ios::binary);
  file.seekg(0, std::ios::end);
  const auto size = static_cast<std::uint64_t>(file.tellg());
  const std::uint64_t start = std::stoull(offset);
  if (!file || start > size || (size - start) / sizeof(float) < count) throw refuse();
  std::vector<float> values(count);
  file.seekg(static_cast<std::streamoff>(start));
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file) throw refuse();
  return values;
}

}  // namespace tarflow::detail::onnx

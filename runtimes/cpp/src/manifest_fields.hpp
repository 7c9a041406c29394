// Fields: a JSON object of a manifest that is read field by field, with errors that name the field.
#pragma once

#include <climits>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bundle_files.hpp"

namespace tarflow::detail {

using Json = nlohmann::json;

struct Fields {
  static constexpr std::int64_t kLargest = 1 << 20;  // default limit of a count

  const Json& data;
  const std::string& root;  // of the bundle
  std::string where;        // path of the object within the manifest, empty or ending with a dot

  Error error(const std::string& name, const std::string& problem) const {
    return bundle_problem(root, "manifest.json: " + where + name + " " + problem);
  }
  const Json& value(const std::string& name, bool (*is)(const Json&), const char* kind) const {
    const auto found = data.find(name);
    if (found == data.end()) throw error(name, "is missing");
    if (!is(*found)) throw error(name, std::string("must be of type ") + kind + ", got " + found->type_name());
    return *found;
  }
  bool has(const std::string& name) const { return data.contains(name) && !data.at(name).is_null(); }
  std::int64_t integer(const std::string& name) const {
    const Json& found = value(name, [](const Json& v) { return v.is_number_integer(); }, "integer");
    if (found.is_number_unsigned() && found.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
      throw error(name, "is too large");
    return found.get<std::int64_t>();
  }
  std::int64_t count(const std::string& name, std::int64_t minimum = 1, std::int64_t maximum = kLargest) const {
    const std::int64_t number = integer(name);
    if (number < minimum || number > maximum)
      throw error(name, "must be " + std::to_string(minimum) + " to " + std::to_string(maximum) + ", got " +
                            std::to_string(number));
    return number;
  }
  bool boolean(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_boolean(); }, "boolean").get<bool>();
  }
  double number(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_number(); }, "number").get<double>();
  }
  std::string text(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_string(); }, "string").get<std::string>();
  }
  std::string choice(const std::string& name, const std::vector<std::string>& valid) const {
    const std::string found = text(name);
    std::string listed;
    for (const std::string& one : valid) {
      if (found == one) return found;
      listed += (listed.empty() ? "" : ", ") + one;
    }
    throw error(name, "must be one of " + listed + ", got '" + found + "'");
  }
  const Json& list(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_array(); }, "list");
  }
  Fields child(const std::string& name) const {
    return {value(name, [](const Json& v) { return v.is_object(); }, "object"), root, where + name + "."};
  }
  /// Every member of a list, which must be objects.
  std::vector<Fields> objects(const std::string& name) const {
    std::vector<Fields> found;
    for (const Json& member : list(name)) {
      const std::string place = name + "[" + std::to_string(found.size()) + "]";
      if (!member.is_object()) throw error(place, "must be an object");
      found.push_back({member, root, where + place + "."});
    }
    return found;
  }
};

}  // namespace tarflow::detail

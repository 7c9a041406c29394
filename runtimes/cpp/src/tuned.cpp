#include "tuned.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "error.hpp"

namespace tarflow::detail {
namespace {

using Json = nlohmann::json;

struct NotPlans {
  std::string why;
};

const Json& field(const Json& object, const char* name) {
  if (!object.is_object() || !object.contains(name)) throw NotPlans{std::string("'") + name + "' is missing"};
  return object.at(name);
}

std::int64_t integer(const Json& value, const char* name) {
  if (!value.is_number_integer()) throw NotPlans{std::string(name) + " is no integer"};
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
    throw NotPlans{std::string(name) + " is too large"};
  return value.get<std::int64_t>();
}

Strategy strategy_of(const Json& value) {
  const auto refuse = [&] { return NotPlans{"not a decoding strategy: " + value.dump()}; };
  const Json& kind = field(value, "decode");
  Strategy made;
  made.parallel = kind == "parallel";
  if (!made.parallel && kind != "sequential") throw refuse();
  for (const auto& [name, setting] : value.items()) {
    if (name == "decode") continue;
    if (made.parallel && name == "window" && setting.is_number_integer()) {
      made.window = integer(setting, "window");
    } else if (made.parallel && name == "tolerance" && setting.is_number()) {
      made.tolerance = setting.get<double>();
    } else if (made.parallel && name == "init" && (setting == "noise" || setting == "zeros")) {
      made.from_zeros = setting == "zeros";
    } else {
      throw refuse();
    }
  }
  if (made.window < 0 || !std::isfinite(made.tolerance) || made.tolerance < 0.0) throw refuse();
  return made;
}

TunedPlan entry_of(const Json& value) {
  TunedPlan made;
  const Json& identity = field(value, "identity");
  if (!identity.is_object()) throw NotPlans{"an identity is no object"};
  for (const auto& [name, fact] : identity.items()) {
    if (!fact.is_string()) throw NotPlans{"an identity holds more than strings"};
    made.identity[name] = fact.get<std::string>();
  }
  made.batch = integer(field(value, "batch"), "batch");
  made.branches = integer(field(value, "branches"), "branches");
  const Json& plan = field(value, "plan");
  if (!plan.is_array()) throw NotPlans{"a plan is no list"};
  for (const Json& one : plan) made.plan.push_back(strategy_of(one));
  for (const char* seconds : {"seconds", "sequential_seconds"}) {
    if (!field(value, seconds).is_number()) throw NotPlans{std::string(seconds) + " is no number"};
  }
  return made;
}

std::vector<TunedPlan> entries_of(const std::string& path) {
  const auto refuse = [&](const std::string& why) {
    return input_error(path + ": not a file of tuned plans: " + why, "remove it and run tarflow tune");
  };
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) throw refuse("cannot be read");
  try {
    const Json document = Json::parse(text);
    const std::int64_t version = integer(field(document, "schema_version"), "schema_version");
    if (version != 1) throw NotPlans{"schema_version is " + std::to_string(version) + ", this version reads 1"};
    const Json& plans = field(document, "plans");
    if (!plans.is_array()) throw NotPlans{"plans is no list"};
    std::vector<TunedPlan> entries;
    for (const Json& one : plans) entries.push_back(entry_of(one));
    return entries;
  } catch (const Json::exception& error) {
    throw refuse(error.what());
  } catch (const NotPlans& error) {
    throw refuse(error.why);
  }
}

std::string beside(const std::string& bundle) {
  const std::string ending = ".tarflow";
  const std::size_t stem = bundle.size() - std::min(bundle.size(), ending.size());
  return (bundle.substr(stem) == ending ? bundle.substr(0, stem) : bundle) + ".plans.json";
}

}  // namespace

std::map<std::string, std::string> identity_of(const Engine& engine) {
  return {{"bundle", engine.bundle().digest},
          {"tarflow-sdk", TARFLOW_VERSION},
          {"engine", engine.name()},
          {"device", engine.device()},
          {"weights", engine.weights()},
          {"onnxruntime", ort_version()}};
}

Plan TunedPlans::plan(std::int64_t images, std::int64_t branches, std::int64_t blocks) const {
  const TunedPlan* best = nullptr;
  for (const TunedPlan& one : entries) {
    const bool fits = one.branches == branches && one.batch >= images &&
                      static_cast<std::int64_t>(one.plan.size()) == blocks;
    if (fits && (best == nullptr || one.batch < best->batch)) best = &one;
  }
  return best == nullptr ? Plan{} : best->plan;
}

TunedPlans read_plans(const std::string& path, const Engine& engine) {
  const std::string file = path.empty() ? beside(engine.bundle().path) : path;
  const std::string name = file.substr(file.rfind('/') + 1);
  TunedPlans found;
  struct stat status = {};
  if (stat(file.c_str(), &status) != 0) {
    found.reason = name + " does not exist: nothing was tuned (tarflow tune)";
    return found;
  }
  const std::map<std::string, std::string> identity = identity_of(engine);
  std::set<std::string> differing;
  for (TunedPlan& one : entries_of(file)) {
    for (const auto& [fact, value] : identity) {
      const auto theirs = one.identity.find(fact);
      if (theirs == one.identity.end() || theirs->second != value) differing.insert(fact);
    }
    if (one.identity == identity) found.entries.push_back(std::move(one));
  }
  if (!found.entries.empty()) return found;
  for (const std::string& fact : differing) found.reason += (found.reason.empty() ? "" : ", ") + fact;
  const std::string another = found.reason.empty() ? "machine" : found.reason;
  found.reason = name + " was tuned for another " + another + " (tarflow tune)";
  return found;
}

}  // namespace tarflow::detail

// The command line of tarflow-sample: the core flags of `tarflow-infer`, with its words.
#pragma once

#include <optional>
#include <string>
#include <tarflow/tarflow.hpp>
#include <vector>

namespace tool {

struct Arguments {
  std::string bundle, output = "samples.png";
  std::optional<std::string> labels;
  std::optional<std::uint64_t> seed;
  std::optional<std::int64_t> n;
  bool overwrite = false, json = false;
  tarflow::SampleOptions options;
  tarflow::Model::Options model;
};

/// An input error: one line, and how to fix it.
tarflow::Error refused(const std::string& message,
                       const std::string& hint = "tarflow-sample --help lists what it takes");

extern const char* const kUsage;

/// Read the command line and refuse what is wrong with any bundle. Throws tarflow::Error.
Arguments parse(int argc, char** argv);

/// Class numbers of a comma-separated list: names of the bundle, numbers, or `null`, -1; `all` alone is every class in
/// turn. Where names are numbers themselves, numbers are names only. Throws tarflow::Error on a label it does not have.
std::vector<std::int64_t> parse_labels(const std::string& text, const tarflow::Model& model,
                                       const std::vector<std::string>& names);

/// The names of the model's classes, empty where the bundle has none.
std::vector<std::string> names_of(const tarflow::Model& model);

/// A number as Python writes it: the shortest digits that give it back.
std::string repr(double value);

}  // namespace tool

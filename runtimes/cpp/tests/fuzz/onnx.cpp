// Fuzzes the reader of ONNX graphs and the rewrites that follow it, with the configuration of the shipped model.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "error.hpp"
#include "onnx.hpp"
#include "rewrites/rewrites.hpp"

using namespace tarflow::detail;
namespace fs = std::filesystem;

namespace {

Config shipped_config() {
  Config config{};
  config.image_size = 28;
  config.image_channels = 1;
  config.patch_size = 4;
  config.width = 128;
  config.blocks = 4;
  config.layers = 4;
  config.head_dim = 64;
  config.classes = 10;
  config.nvp = true;
  return config;
}

/// Two megabytes for external tensors to lie in, removed when the process ends.
class Weights {
 public:
  Weights() : path_(fs::temp_directory_path() / ("tarflow_fuzz_" + std::to_string(getpid()) + ".bin")) {
    std::ofstream(path_).put('\0');
    fs::resize_file(path_, 2 << 20);
  }
  ~Weights() { fs::remove(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void rewrite(const onnx::Model& model, const Config& config, const StepKind& kind, const std::string& weights) {
  try {
    const SequentialGraph graph = sequential_graph(model, config, kind);
    onnx::parse_model(graph.model, "a rewritten graph");
    onnx::external_floats(graph.tables.pos_embed, weights);
    onnx::external_floats(graph.tables.class_embed, weights);
  } catch (const PatternMismatch&) {
  } catch (const Error& error) {
    if (error.status != TARFLOW_ERROR_ENGINE) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Weights weights;
  static const Config config = shipped_config();
  onnx::Model model;
  try {
    model = onnx::parse_model(std::string(reinterpret_cast<const char*>(data), size), "input");
    onnx::check_external_data(model, "weights.bin", "input");
  } catch (const Error& error) {
    if (error.status != TARFLOW_ERROR_BUNDLE || error.hint.empty()) std::abort();
    return 0;
  }
  const std::string bytes = onnx::serialize(model);
  if (onnx::serialize(onnx::parse_model(bytes, "its serialisation")) != bytes) std::abort();
  rewrite(model, config, {1, false, false}, weights.path());
  rewrite(model, config, {2, true, false}, weights.path());
  rewrite(model, config, {2, true, true}, weights.path());
  try {
    const SplitGradient split = split_gradient(model);
    onnx::parse_model(split.forward, "the way there");
    onnx::parse_model(split.backward, "the way back");
  } catch (const PatternMismatch&) {
  }
  return 0;
}

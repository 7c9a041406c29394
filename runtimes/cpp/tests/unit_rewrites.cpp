// The ONNX reader and writer, and the load-time rewrites: each against the portable graph, and what declines.
// unit_rewrites BUNDLE [FOLDER]: into FOLDER go the rewritten graphs of block 1, for a comparison with Python's.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "check.hpp"
#include "decode.hpp"
#include "density.hpp"
#include "error.hpp"
#include "noise.hpp"
#include "rewrites/rewrites.hpp"

using namespace tarflow::detail;

static std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static onnx::Model read(const std::string& path) { return onnx::parse_model(contents(path), path); }

static onnx::Node& find(onnx::Model& model, const std::string& op, std::size_t index = 0) {
  for (onnx::Node& node : model.nodes) {
    if (node.op_type == op && index-- == 0) return node;
  }
  throw std::runtime_error("no " + op);
}

static onnx::Node& named(onnx::Model& model, const std::string& name) {
  for (onnx::Node& node : model.nodes) {
    if (node.name == name) return node;
  }
  throw std::runtime_error("no node " + name);
}

static void test_format(const Bundle& bundle) {
  const onnx::Model model = read(bundle.blocks[0].step);
  CHECK(onnx::serialize(onnx::parse_model(onnx::serialize(model), "again")) == onnx::serialize(model));
  const std::string whole = contents(bundle.blocks[0].step);
  for (const std::string& data : {std::string(), std::string("\x08\x01"), std::string("text that is not a model"),
                                  whole.substr(0, whole.size() / 2), std::string(4, '\xff')}) {
    try {
      onnx::parse_model(data, "file");
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.status == TARFLOW_ERROR_BUNDLE && std::strstr(error.what(), "file is not an ONNX model") != nullptr);
    }
  }
  onnx::check_external_data(model, "weights.bin", "step");
  try {
    onnx::check_external_data(model, "other.bin", "step");
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.status == TARFLOW_ERROR_BUNDLE && std::strstr(error.what(), "lies in weights.bin") != nullptr);
  }
  CHECK(onnx::number(onnx::tensor("one", {7})) == 7.0);
  CHECK(std::isnan(onnx::number(onnx::tensor("two", {7, 8}))));
  CHECK(onnx::elem_type(onnx::value("v", onnx::kFloat16, {std::string("B"), std::int64_t{3}})) == onnx::kFloat16);
  const onnx::Attribute scale = onnx::attribute("scale", 0.5F);
  CHECK(scale.value<float>() == 0.5F && !scale.value<std::int64_t>());
  CHECK(onnx::attribute("axis", std::int64_t{-2}).value<std::int64_t>() == -2);
}

/// Step graphs of other forms must be declined, not run wrongly.
static void test_declined(const Bundle& bundle) {
  using Damage = std::function<void(onnx::Model&)>;
  const std::pair<const char*, Damage> damages[] = {
      {"no scatter", [](auto& m) { find(m, "TensorScatter").op_type = "Identity"; }},
      {"caches exchanged", [](auto& m) { find(m, "TensorScatter").input[0] = "value_0"; }},
      {"written elsewhere", [](auto& m) { find(m, "TensorScatter").input[2] = "labels"; }},
      {"no mask", [](auto& m) { find(m, "Where").op_type = "Max"; }},
      {"mask of the labels", [](auto& m) { find(m, "LessOrEqual").input[0] = "labels"; }},
      {"mask of another sign", [](auto& m) { find(m, "LessOrEqual").op_type = "Greater"; }},
      {"another activation", [](auto& m) { find(m, "Softmax").op_type = "Sigmoid"; }},
      {"another domain", [](auto& m) { find(m, "Softmax").domain = "other"; }},
      {"softmax over queries",
       [](auto& m) { find(m, "Softmax").attributes = {onnx::attribute("axis", std::int64_t{2})}; }},
      {"axis of another type", [](auto& m) { find(m, "Softmax").attributes = {onnx::attribute("axis", 2.0F)}; }},
      {"embedding multiplied", [](auto& m) { named(m, "embed/Add").op_type = "Mul"; }},
      {"other projection", [](auto& m) { find(m, "Gemm").input[1] = "pos_embed"; }},
      {"exp of another sum", [](auto& m) { find(m, "Exp").input[0] = find(m, "Gemm").output[0]; }},
      {"no inputs", [](auto& m) { find(m, "Where").input.clear(); }},
      {"a circle", [](auto& m) { find(m, "Gemm").input[0] = "next"; }},
  };
  sequential_graph(read(bundle.blocks[0].step), bundle.config, {2, true, false});  // the graph itself is taken
  for (const auto& [what, damage] : damages) {
    onnx::Model model = read(bundle.blocks[0].step);
    damage(model);
    try {
      sequential_graph(model, bundle.config, {2, true, false});
      std::fprintf(stderr, "not declined: %s\n", what);
      ++failures;
    } catch (const PatternMismatch&) {
    }
  }
  for (const std::string& path : {bundle.blocks[0].step, bundle.blocks[0].forward}) {
    try {
      split_gradient(read(path));
      CHECK(false);
    } catch (const PatternMismatch&) {
    }
  }
  CHECK(!split_gradient(read(bundle.blocks[0].gradient)).saved.empty());
}

/// What the same engine computes without its rewrites.
static void test_against_portable(const std::string& path) {
  const Engine rewritten(open_bundle(path, true), {});
  Engine::Settings settings;
  settings.portable = true;
  const Engine portable(open_bundle(path, true), settings);
  const Config& c = rewritten.config();
  constexpr std::int64_t kImages = 3;
  Floats latents(static_cast<std::size_t>(kImages * c.dims()));
  for (std::int64_t image = 0; image < kImages; ++image)
    standard_normal(5, static_cast<std::uint64_t>(image), c.dims(), latents.data() + image * c.dims());
  Strategy windows;
  windows.parallel = true;
  windows.window = 7;
  windows.tolerance = 0.0;
  Guidance guidance;
  guidance.weight = 1.5;
  guidance.temperature = 0.7;
  guidance.anneal = true;
  for (const Guidance& guided : {Guidance{}, guidance}) {
    for (const Plan& plan : {Plan{}, Plan(static_cast<std::size_t>(c.blocks), windows)}) {
      DecodeInputs inputs;
      if (c.classes != 0) inputs.labels = {1, c.classes, 0};
      inputs.guidance = guided;
      inputs.plan = plan;
      DecodeReport one, other;
      const Floats x = decode_patches(rewritten, latents, inputs, one);
      const Floats y = decode_patches(portable, latents, inputs, other);
      double worst = 0.0;
      for (std::size_t i = 0; i < x.size(); ++i) worst = std::max<double>(worst, std::fabs(x[i] - y[i]));
      std::printf("rewritten to portable, %s, %s: %.2g\n", guided.weight > 0.0 ? "guided" : "plain",
                  plan.empty() ? "sequential" : "windows", worst);
      CHECK(worst < 1e-3);  // four times the float32 floor of the shipped model's guided images, docs/DECODING.md
    }
  }
  CHECK(rewritten.declined() == 0);
  const Floats split = score(rewritten, latents, {1, c.classes, 0}, Call{});
  const Floats recomputed = score(portable, latents, {1, c.classes, 0}, Call{});
  float largest = 0.0F, worst = 0.0F;
  for (std::size_t i = 0; i < split.size(); ++i) {
    largest = std::max(largest, std::fabs(recomputed[i]));
    worst = std::max(worst, std::fabs(split[i] - recomputed[i]));
  }
  std::printf("split to whole gradient: %.2g of %.2g\n", static_cast<double>(worst), static_cast<double>(largest));
  CHECK(worst < 1e-5F * largest);
}

static void write(const Bundle& bundle, const std::string& folder) {
  const auto save = [&](const std::string& name, const std::string& data) {
    std::ofstream(folder + "/" + name + ".onnx", std::ios::binary) << data;
  };
  for (const std::int64_t branches : {1, 2}) {
    for (const bool temperature : {false, true}) {
      for (const bool windows : {false, true}) {
        const std::string name = std::to_string(branches) + (temperature ? "t" : "") + (windows ? "w" : "");
        save("step_" + name,
             sequential_graph(read(bundle.blocks[1].step), bundle.config, {branches, temperature, windows}).model);
      }
    }
  }
  if (!bundle.config.nvp || bundle.half) return;
  const SplitGradient halves = split_gradient(read(bundle.blocks[1].gradient));
  save("gradient_forward", halves.forward);
  save("gradient_backward", halves.backward);
}

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) return 2;
  return finish([&] {
    const Bundle bundle = open_bundle(argv[1], true);
    if (argc == 3) return write(bundle, argv[2]);
    load_ort("");
    test_format(bundle);
    test_declined(bundle);
    test_against_portable(argv[1]);
  });
}

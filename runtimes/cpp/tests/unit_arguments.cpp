// What the C ABI refuses, and with which words: unit_arguments BUNDLE
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "check.hpp"

/// Before a model is open: what is not ONNX Runtime is TARFLOW_ERROR_ENGINE, and leaves the way free for the right one.
static void test_library(const char* bundle) {
  tarflow_model* model = nullptr;
  tarflow_model_options options;
  tarflow_model_options_init(&options);
  options.engine = "ort-cpu";
  options.ort_library = "/nowhere/libonnxruntime.so";
  CHECK_FAILS(tarflow_model_open(bundle, &options, &model), TARFLOW_ERROR_ENGINE, "/nowhere/libonnxruntime.so");
  CHECK(*tarflow_last_hint() != '\0');
  options.ort_library = "libm.so.6";
  CHECK_FAILS(tarflow_model_open(bundle, &options, &model), TARFLOW_ERROR_ENGINE, "not ONNX Runtime");
  CHECK_FAILS(tarflow_model_open("/nowhere.tarflow", nullptr, &model), TARFLOW_ERROR_BUNDLE, "/nowhere.tarflow");
  CHECK(model == nullptr && *tarflow_ort_version() == '\0');
}

/// Once it is loaded: the same file under another name is the same ONNX Runtime, another file is refused.
static void test_other_library(const char* bundle) {
  const char* used = std::getenv("TARFLOW_ORT_LIBRARY");
  if (used == nullptr || *used != '/') return;
  const std::string renamed = "/." + std::string(used);
  tarflow_model* model = nullptr;
  tarflow_model_options options;
  tarflow_model_options_init(&options);
  options.engine = "ort-cpu";
  options.ort_library = renamed.c_str();
  CHECK(tarflow_model_open(bundle, &options, &model) == TARFLOW_OK);
  tarflow_model_free(model);
  options.ort_library = "libm.so.6";
  CHECK_FAILS(tarflow_model_open(bundle, &options, &model), TARFLOW_ERROR_ENGINE, "already, not from libm.so.6");
}

/// The engine that was asked for, or an error.
static void test_engines(const char* bundle) {
  tarflow_model* model = nullptr;
  tarflow_model_options options;
  tarflow_model_options_init(&options);
  CHECK(options.engine == nullptr);
  options.engine = "Native";
  CHECK_FAILS(tarflow_model_open(bundle, &options, &model), TARFLOW_ERROR_ENGINE, "unknown engine 'Native'");
  CHECK(std::strstr(tarflow_last_hint(), "native, ort-cpu, auto") != nullptr);
  for (const char* name : {"ort-cuda", "trt", "trt-rtx"}) {
    options.engine = name;
    CHECK_FAILS(tarflow_model_open(bundle, &options, &model), TARFLOW_ERROR_ENGINE, "is not in libtarflow");
    CHECK(std::strstr(tarflow_last_hint(), "docs/GPU.md") != nullptr);
  }
  CHECK(model == nullptr);
  for (const char* name : {"native", "ort-cpu"}) CHECK(open_on(name, bundle).engine().name == std::string(name));
  for (const char* name : {"", "auto"}) CHECK(open_on(name, bundle).engine().name == std::string("native"));
}

static void test_arguments(const tarflow::Model& model) {
  tarflow_sampler* sampler = nullptr;
  CHECK(tarflow_sampler_create(nullptr, &sampler) == TARFLOW_ERROR_INPUT);
  CHECK(tarflow_sampler_create(model.get(), &sampler) == TARFLOW_OK);
  std::vector<float> images(model.dims());
  const auto sampled = [&](const std::function<void(tarflow_sample_options&)>& change, const int64_t* labels) {
    tarflow_sample_options options;
    tarflow_sample_options_init(&options);
    change(options);
    return tarflow_sampler_sample(sampler, 1, labels, &options, images.data(), images.size());
  };
  const int64_t wrong = 10;
  const int64_t null = -1;
  CHECK_FAILS(sampled([](auto&) {}, &wrong), TARFLOW_ERROR_INPUT, "label 10");
  CHECK_FAILS(sampled([](auto& o) { o.guidance = 1.0; }, &null), TARFLOW_ERROR_INPUT, "nothing to compare");
  CHECK_FAILS(sampled([](auto& o) { o.guidance = -1.0; }, nullptr), TARFLOW_ERROR_INPUT, "guidance");
  CHECK_FAILS(sampled([](auto& o) { o.guidance = std::nan(""); }, nullptr), TARFLOW_ERROR_INPUT, "guidance");
  CHECK_FAILS(sampled([](auto& o) { o.attention_temperature = 0.0; }, nullptr), TARFLOW_ERROR_INPUT, "temperature");
  CHECK_FAILS(sampled([](auto& o) { o.guide = 4; }, nullptr), TARFLOW_ERROR_INPUT, "guide");
  CHECK_FAILS(sampled([](auto& o) { o.batch_size = -1; }, nullptr), TARFLOW_ERROR_INPUT, "batch_size");
  CHECK_FAILS(sampled([](auto& o) { o.struct_size += 8; }, nullptr), TARFLOW_ERROR_INPUT, "struct_size");
  CHECK_FAILS(sampled([](auto& o) { o.struct_size = 0; }, nullptr), TARFLOW_ERROR_INPUT, "struct_size");
  CHECK_FAILS(tarflow_sampler_sample(sampler, 1, nullptr, nullptr, images.data(), 3), TARFLOW_ERROR_INPUT,
              "images_length");
  CHECK_FAILS(tarflow_sampler_sample(sampler, 0, nullptr, nullptr, images.data(), 0), TARFLOW_ERROR_INPUT, "n must be");
  CHECK_FAILS(tarflow_sampler_sample(sampler, 1, nullptr, nullptr, nullptr, 0), TARFLOW_ERROR_INPUT, "images must not");
  double log_prob = 0.0;
  images[5] = INFINITY;
  CHECK_FAILS(tarflow_sampler_log_prob(sampler, 1, images.data(), nullptr, &log_prob), TARFLOW_ERROR_INPUT,
              "not finite");
  const char* name = nullptr;
  CHECK_FAILS(tarflow_model_label(model.get(), 10, &name), TARFLOW_ERROR_INPUT, "class 10");
  CHECK(model.label(3) == "3");
  const tarflow_config& config = model.config();
  CHECK(config.data == TARFLOW_DATA_IMAGE && config.nvp == 1 && config.image_size == 28 && config.image_channels == 1);
  CHECK(config.patches == 49 && config.patch_values == 16 && std::strlen(config.digest) == 64);
  float noise = 0.0F;
  CHECK_FAILS(tarflow_noise(0, UINT64_MAX, 2, 1, 1, &noise), TARFLOW_ERROR_INPUT, "first_index");
  // A caller with an older, shorter struct: the fields that it lacks keep their defaults.
  tarflow_sample_options old;
  tarflow_sample_options_defaults(&old, offsetof(tarflow_sample_options, batch_size));
  old.batch_size = -5;
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, &old, images.data(), images.size()) == TARFLOW_OK);
  tarflow_sampler_free(sampler);
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  return finish([&] {
    test_library(argv[1]);
    test_engines(argv[1]);
    test_arguments(tarflow::Model(argv[1]));
    test_other_library(argv[1]);
  });
}

// The native engine where there is no ONNX Runtime: unit_native BUNDLE, with TARFLOW_ORT_LIBRARY=/nowhere
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

const std::vector<std::int64_t> kLabels = {3, -1, 7, 0, 5};

std::vector<tarflow::SampleOptions> options_of_all_kinds() {
  tarflow::SampleOptions plain;
  plain.seed = 5;
  plain.denoise = false;
  std::vector<tarflow::SampleOptions> kinds(4, plain);
  kinds[1].guidance = 2.0;
  kinds[2].guidance = 1.5;
  kinds[2].attention_temperature = 0.7;
  kinds[2].anneal_guidance = true;
  kinds[3].guidance = 1.0;
  kinds[3].guide = TARFLOW_GUIDE_A;
  return kinds;
}

/// One set of bits: whatever the batch, the threads, and whether somebody watches.
void test_bits(const std::string& bundle) {
  tarflow::Model::Options one_thread;
  one_thread.threads = 1;
  const tarflow::Model model(bundle), other(bundle, one_thread);
  const tarflow_engine engine = model.engine();
  CHECK(std::string(engine.name) == "native" && *engine.kernel != '\0' && *engine.ort_version == '\0');
  tarflow::Sampler sampler(model), single(other);
  const auto dims = static_cast<std::ptrdiff_t>(model.dims());
  for (tarflow::SampleOptions options : options_of_all_kinds()) {
    const std::vector<float> images = sampler.sample(5, kLabels, options);
    CHECK(sampler.report().non_finite.empty());
    CHECK(single.sample(5, kLabels, options) == images);
    options.batch_size = 2;
    std::int64_t steps = 0;
    options.on_step = [&](const tarflow_step& step) {
      CHECK(step.step > steps);
      steps = step.step;
      return true;
    };
    CHECK(sampler.sample(5, kLabels, options) == images);
    CHECK(steps == 3 * 4 * 48);
    options.on_step = nullptr;
    options.first_index = 2;
    CHECK(sampler.sample(1, {kLabels[2]}, options) ==
          std::vector<float>(images.begin() + 2 * dims, images.begin() + 3 * dims));
  }
}

/// The same of the density: latents go back to their images, and no bit depends on the batch or the threads.
void test_density(const std::string& bundle) {
  tarflow::Model::Options one_thread;
  one_thread.threads = 1;
  const tarflow::Model model(bundle), other(bundle, one_thread);
  tarflow::Sampler sampler(model), single(other);
  const auto dims = static_cast<std::ptrdiff_t>(model.dims());
  tarflow::SampleOptions options = options_of_all_kinds()[0];
  const std::vector<float> images = sampler.sample(5, kLabels, options);
  const tarflow::Encoded encoded = sampler.encode(images, kLabels);
  const std::vector<double> log_prob = sampler.log_prob(images, kLabels), posteriors = sampler.classify(images);
  CHECK(single.encode(images, kLabels).z == encoded.z && single.log_prob(images, kLabels) == log_prob);
  CHECK(single.classify(images) == posteriors);
  const std::vector<float> third(images.begin() + 2 * dims, images.begin() + 3 * dims);
  const tarflow::Encoded alone = sampler.encode(third, {kLabels[2]});
  CHECK(std::equal(alone.z.begin(), alone.z.end(), encoded.z.begin() + 2 * dims));
  CHECK(alone.log_det[0] == encoded.log_det[2] && sampler.log_prob(third, {kLabels[2]})[0] == log_prob[2]);
  options.seed = 0;
  options.noise = encoded.z;
  const std::vector<float> again = sampler.sample(5, kLabels, options);
  for (std::size_t i = 0; i < images.size(); ++i) CHECK(std::abs(again[i] - images[i]) < 1e-3F);
}

/// The denoiser, which needs ONNX Runtime, says so, before anything else is done.
void test_missing(const std::string& bundle) {
  const tarflow::Model model(bundle);
  tarflow_sampler* sampler = nullptr;
  tarflow::check(tarflow_sampler_create(model.get(), &sampler));
  std::vector<float> image(model.dims());
  tarflow_sample_options options;
  tarflow_sample_options_init(&options);
  int steps = 0;
  options.user_data = &steps;
  options.on_step = [](const tarflow_step*, void* data) { return ++*static_cast<int*>(data), 0; };
  CHECK_FAILS(tarflow_sampler_sample(sampler, 1, nullptr, &options, image.data(), image.size()), TARFLOW_ERROR_ENGINE,
              "ONNX Runtime, which the denoiser needs, is not found: /nowhere");
  CHECK(steps == 0 && std::strstr(tarflow_last_hint(), "denoise = 0") != nullptr);
  CHECK_FAILS(tarflow_sampler_denoise(sampler, 1, image.data(), nullptr, 0.1, 1.0, image.data()), TARFLOW_ERROR_ENGINE,
              "which the denoiser needs");
  options.denoise = 0;
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, &options, image.data(), image.size()) == TARFLOW_OK && steps > 0);
  tarflow_sampler_free(sampler);
  tarflow_model_options ort_cpu;
  tarflow_model_options_init(&ort_cpu);
  ort_cpu.engine = "ort-cpu";
  tarflow_model* other = nullptr;
  CHECK_FAILS(tarflow_model_open(bundle.c_str(), &ort_cpu, &other), TARFLOW_ERROR_ENGINE, "which engine ort-cpu needs");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  return finish([&] {
    test_bits(argv[1]);
    test_density(argv[1]);
    test_missing(argv[1]);
    std::ifstream file("/proc/self/maps");
    const std::string maps(std::istreambuf_iterator<char>(file), {});
    CHECK(maps.find("libtarflow") != std::string::npos && maps.find("onnxruntime") == std::string::npos);
    CHECK(*tarflow_ort_version() == '\0');
  });
}

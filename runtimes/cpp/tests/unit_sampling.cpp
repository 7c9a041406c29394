// Progress, cancelling, threads and round trips on a real model: unit_sampling BUNDLE ENGINE
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

static void test_sampling(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  const bool native = model.engine().name == std::string("native");
  const std::int64_t total = 4 * 48;
  tarflow::SampleOptions options;
  options.seed = 3;
  int calls = 0;
  tarflow_step last{};
  options.on_step = [&](const tarflow_step& step) {
    ++calls;
    CHECK(step.step > last.step && step.total == total && step.block == 3 - (step.step - 1) / 48);
    last = step;
    return true;
  };
  const std::vector<std::int64_t> labels = {0, 1, 2};
  const std::vector<float> images = sampler.sample(3, labels, options);
  CHECK(last.step == total && (native ? calls >= 4 : calls == total));

  calls = 0;
  options.on_step = [&](const tarflow_step&) { return ++calls < 3; };
  try {
    sampler.sample(3, labels, options);
    CHECK(false);
  } catch (const tarflow::Error& error) {
    CHECK(error.code() == TARFLOW_ERROR_CANCELLED);
  }
  CHECK(calls == 3);
  options.on_step = [](const tarflow_step&) -> bool { throw std::string("mine"); };
  try {
    sampler.sample(3, labels, options);
    CHECK(false);
  } catch (const std::string& thrown) {
    CHECK(thrown == "mine");
  }
  options.on_step = nullptr;
  CHECK(sampler.sample(3, labels, options) == images);  // cancelled runs left the sampler as it was

  // An image does not depend on its batch: image 2 alone, to rounding, for the denoiser is ONNX Runtime's.
  options.first_index = 2;
  const std::vector<float> alone = sampler.sample(1, {2}, options);
  for (std::size_t i = 0; i < alone.size(); ++i) CHECK(std::fabs(alone[i] - images[2 * alone.size() + i]) < 1e-4F);
  options.first_index = 0;

  // Samplers of one model in several threads give what one gives.
  std::vector<std::vector<float>> results(3);
  std::vector<std::thread> threads;
  for (auto& result : results)
    threads.emplace_back([&] { result = tarflow::Sampler(model).sample(3, labels, options); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) CHECK(result == images);

  // Decoding inverts encoding.
  options.denoise = false;
  const std::vector<float> raw = sampler.sample(3, labels, options);
  tarflow::Encoded encoded = sampler.encode(raw, labels);
  options.seed = 0;
  options.noise = encoded.z;
  const std::vector<float> again = sampler.sample(3, labels, options);
  for (std::size_t i = 0; i < raw.size(); ++i) CHECK(std::fabs(again[i] - raw[i]) < 1e-3F);
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return finish([&] { test_sampling(open_on(argv[2], argv[1])); });
}

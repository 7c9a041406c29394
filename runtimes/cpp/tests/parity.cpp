// The same numbers as Python: tarflow_parity BUNDLE GOLDEN, the file that golden.py wrote.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "tarflow/tarflow.hpp"

static int failures = 0;
static std::ifstream golden;

template <typename T>
static std::vector<T> expected(std::size_t count) {
  std::vector<T> values(count);
  golden.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(T)));
  if (!golden) {
    std::fprintf(stderr, "the golden file is too short\n");
    ++failures;
  }
  return values;
}

/// Largest |difference| / max(1, |expected| * relative): sums over the dims are compared relative to their size.
template <typename T>
static void compare(const char* name, const std::vector<T>& got, double limit, bool relative = false) {
  const std::vector<T> wanted = expected<T>(got.size());
  double worst = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double scale = relative ? std::max(1.0, std::fabs(static_cast<double>(wanted[i]))) : 1.0;
    const double difference = std::fabs(static_cast<double>(got[i]) - static_cast<double>(wanted[i])) / scale;
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  std::printf("%-10s %.3g (limit %.3g)\n", name, worst, limit);
  if (!(worst <= limit)) ++failures;
}

/// Four times the float32 floor of this model's guided images, 2.6e-4 over 256 images (docs/DECODING.md).
constexpr double kGuidedLimit = 1e-3;

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  golden.open(argv[2], std::ios::binary);
  try {
    const tarflow::Model model(argv[1]);
    tarflow::Sampler sampler(model);
    const tarflow_config& config = model.config();
    std::vector<float> noise(4 * model.dims());
    tarflow::check(tarflow_noise(7, 3, 4, config.patches, config.patch_values, noise.data()));
    const std::vector<float> bits = expected<float>(noise.size());
    if (std::memcmp(noise.data(), bits.data(), 4 * noise.size()) != 0) {
      std::printf("the noise differs\n");
      ++failures;
    }
    const std::vector<std::int64_t> labels = {0, 1, 2, 3};
    tarflow::SampleOptions options;
    options.seed = 7;
    options.first_index = 3;
    options.denoise = false;
    const std::vector<float> images = sampler.sample(4, labels, options);
    compare("plain", images, 1e-4);
    tarflow::SampleOptions guided;
    guided.seed = 8;
    guided.guidance = 2.0;
    guided.attention_temperature = 1.5;
    guided.anneal_guidance = true;
    compare("guided", sampler.sample(4, {0, 1, -1, 3}, guided), kGuidedLimit);
    tarflow::SampleOptions cut;
    cut.seed = 9;
    cut.guidance = 1.0;
    cut.guide = TARFLOW_GUIDE_A;
    cut.attention_temperature = 1.2;
    cut.batch_size = 3;
    compare("cut", sampler.sample(4, {}, cut), 1e-4);
    const tarflow::Encoded encoded = sampler.encode(images, labels);
    compare("z", encoded.z, 1e-3);
    compare("log_det", encoded.log_det, 1e-5, true);
    compare("log_prob", sampler.log_prob(images, labels), 1e-5, true);
    compare("denoised", sampler.denoise(images, labels, 0.2, 0.5), 1e-4);
    if (golden.peek() != std::ifstream::traits_type::eof()) {
      std::fprintf(stderr, "the golden file is too long\n");
      ++failures;
    }
  } catch (const tarflow::Error& error) {
    std::fprintf(stderr, "%s (%s)\n", error.what(), error.hint().c_str());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}

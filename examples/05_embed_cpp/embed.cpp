// Everything the runtime does, in the order an application might need it: embed_cpp BUNDLE
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <tarflow/tarflow.hpp>
#include <vector>

using Labels = std::vector<std::int64_t>;

static void show(const std::string& bundle) {
  const tarflow::Model model(bundle);
  const auto classes = model.config().classes;
  const tarflow_engine engine = model.engine();
  std::printf("%lld classes on engine %s %s\n", static_cast<long long>(classes), engine.name, engine.kernel);
  tarflow::Sampler sampler(model);
  Labels labels;
  for (std::int64_t i = 0; i < classes; ++i) labels.push_back(i);
  const std::int64_t n = classes > 0 ? classes : 2;

  tarflow::SampleOptions options;
  options.seed = 0;
  options.guidance = classes > 0 ? 2.0 : 0.0;
  options.on_step = [](const tarflow_step& step) {
    if (step.step == step.total) std::printf("sampled in %lld steps\n", static_cast<long long>(step.total));
    return true;
  };
  const std::vector<float> images = sampler.sample(n, labels, options);

  options.on_step = [](const tarflow_step& step) { return step.step < step.total / 2; };
  try {
    sampler.sample(n, labels, options);
  } catch (const tarflow::Error& error) {
    if (error.code() != TARFLOW_ERROR_CANCELLED) throw;
    std::printf("%s; the sampler stays usable\n", error.what());
  }

  std::printf("log q of the first: %.1f nats\n", sampler.log_prob(images, labels)[0]);
  if (classes > 0) {
    const std::vector<double> posteriors = sampler.classify(images);
    std::printf("classes:");
    for (auto row = posteriors.begin(); row != posteriors.end(); row += classes)
      std::printf(" %lld", static_cast<long long>(std::max_element(row, row + classes) - row));
    std::printf("\n");
  }

  tarflow::SampleOptions decode;  // latents in place of noise, and nothing removed: the inverse of encode
  decode.noise = sampler.encode(images, labels).z;
  decode.denoise = false;
  const std::vector<float> back = sampler.sample(n, labels, decode);
  float worst = 0.0F;
  for (std::size_t i = 0; i < images.size(); ++i) worst = std::max(worst, std::fabs(back[i] - images[i]));
  std::printf("round trip: %.1e\n", static_cast<double>(worst));
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: embed_cpp BUNDLE\n");
    return 2;
  }
  try {
    show(argv[1]);
  } catch (const tarflow::Error& error) {
    std::fprintf(stderr, "error: %s\nhint: %s\n", error.what(), error.hint().c_str());
    return 1;
  }
}

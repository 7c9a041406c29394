// libtarflow inside a C++ application: embed_cpp BUNDLE
#include <cstdio>
#include <tarflow/tarflow.hpp>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: embed_cpp BUNDLE\n");
    return 2;
  }
  try {
    const tarflow::Model model(argv[1]);
    tarflow::Sampler sampler(model);

    tarflow::SampleOptions options;
    options.seed = 0;
    options.guidance = model.config().classes != 0 ? 2.0 : 0.0;
    options.on_step = [](const tarflow_step& step) {
      if (step.step == step.total) std::printf("%lld steps\n", static_cast<long long>(step.total));
      return true;
    };
    const std::vector<std::int64_t> labels =
        model.config().classes > 1 ? std::vector<std::int64_t>{0, 1} : std::vector<std::int64_t>{};
    const std::vector<float> images = sampler.sample(2, labels, options);
    std::printf("%zu values, log q %.1f nats\n", images.size(), sampler.log_prob(images, labels)[0]);

    options.on_step = [](const tarflow_step& step) { return step.step < 3; };
    try {
      sampler.sample(2, labels, options);
    } catch (const tarflow::Error& error) {
      if (error.code() != TARFLOW_ERROR_CANCELLED) throw;
      std::printf("%s\n", error.what());
    }
  } catch (const tarflow::Error& error) {
    std::fprintf(stderr, "error: %s\nhint: %s\n", error.what(), error.hint().c_str());
    return 1;
  }
}

// Cancelling from another thread, logs, classes, and every status once: unit_calls BUNDLE ENGINE
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

namespace {

std::set<tarflow_status> provoked;

tarflow_status noted(tarflow_status status) {
  provoked.insert(status);
  return status;
}

/// Within a step: cancelled after the second one, no third is reported, wherever the other parts stand.
void test_cancel(const tarflow::Model& model) {
  for (const std::int64_t images : {1, 32}) {
    tarflow::Sampler sampler(model);
    tarflow::SampleOptions options;
    options.seed = 1;
    const std::vector<float> expected = sampler.sample(images, {}, options);
    std::atomic<int> steps{0};
    std::atomic<bool> cancelled{false};
    int after = 0;
    std::thread other([&] {
      while (steps < 2) std::this_thread::yield();
      sampler.cancel();
      cancelled = true;
    });
    options.on_step = [&](const tarflow_step&) {
      if (cancelled) ++after;
      if (++steps == 2) {
        while (!cancelled) std::this_thread::yield();
      }
      return true;
    };
    try {
      sampler.sample(images, {}, options);
      CHECK(false);
    } catch (const tarflow::Error& error) {
      CHECK(error.code() == TARFLOW_ERROR_CANCELLED);
      noted(error.code());
    }
    other.join();
    CHECK(steps == 2 && after == 0);
    options.on_step = nullptr;
    CHECK(sampler.report().images == 0);
    CHECK(sampler.sample(images, {}, options) == expected);
    CHECK(sampler.report().images == images && sampler.report().non_finite.empty());
    sampler.cancel();  // without a call it has no effect
    CHECK(sampler.sample(images, {}, options) == expected);
  }
  tarflow_sampler_cancel(nullptr);
}

/// While it encodes: from a thread that cancels until a call has ended by it.
void test_cancel_encoding(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  const std::vector<float> images(64 * model.dims(), 0.25F);
  const std::vector<float> expected = sampler.encode(images).z;
  std::atomic<bool> cancelled{false};
  std::thread other([&] {
    while (!cancelled) sampler.cancel();
  });
  while (!cancelled) {
    try {
      sampler.encode(images);
    } catch (const tarflow::Error& error) {
      CHECK(error.code() == TARFLOW_ERROR_CANCELLED);
      cancelled = true;
    }
  }
  other.join();
  CHECK(sampler.encode(images).z == expected);
}

/// A sampler is in one call at a time, and says so: also from its own callback.
void test_busy(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  tarflow::SampleOptions options;
  int refused = 0;
  options.on_step = [&](const tarflow_step&) {
    try {
      sampler.log_prob(std::vector<float>(model.dims()));
    } catch (const tarflow::Error& error) {
      refused += error.code() == TARFLOW_ERROR_INPUT ? 1 : 0;
    }
    return false;
  };
  try {
    sampler.sample(1, {}, options);
    CHECK(false);
  } catch (const tarflow::Error& error) {
    CHECK(error.code() == TARFLOW_ERROR_CANCELLED);
  }
  CHECK(refused == 1);
}

void test_log(const std::string& bundle, const std::string& name) {
  std::atomic<int> lines{0};
  tarflow::Model::Options options;
  options.engine = name;
  options.on_log = [&](tarflow_log_level level, const char* text) {
    CHECK(level >= TARFLOW_LOG_INFO && level <= TARFLOW_LOG_ERROR && *text != '\0');
    ++lines;
    throw 1;  // is dropped
  };
  std::unique_ptr<tarflow::Sampler> sampler;
  {
    const tarflow::Model model(bundle, options);
    CHECK(lines >= 1);
    const tarflow_engine engine = model.engine();
    CHECK(engine.name == name && std::string(engine.precision) == "float32" && engine.threads >= 1);
    CHECK((*engine.kernel != '\0') == (name == "native") && (*engine.ort_version != '\0') == (name == "ort-cpu"));
    sampler = std::make_unique<tarflow::Sampler>(model);
  }
  const int before = lines;
  sampler->sample(1);  // the model is gone, what it shares is not
  CHECK(lines > before && *tarflow_ort_version() != '\0');
}

/// Latents that the model overflows on are no error: the report lists the images, and the log says how many.
void test_overflow(const std::string& bundle, const std::string& name) {
  std::atomic<int> warnings{0};
  tarflow::Model::Options opened;
  opened.engine = name;
  opened.on_log = [&](tarflow_log_level level, const char*) { warnings += level == TARFLOW_LOG_WARNING ? 1 : 0; };
  const tarflow::Model model(bundle, opened);
  tarflow::Sampler sampler(model);
  tarflow::SampleOptions options;
  options.noise = std::vector<float>(3 * model.dims());
  std::fill_n(options.noise->begin() + static_cast<std::ptrdiff_t>(model.dims()), model.dims(), 3e38F);
  options.denoise = false;
  sampler.sample(3, {}, options);
  CHECK(sampler.report().images == 3 && sampler.report().non_finite == std::vector<std::int64_t>{1});
  CHECK(warnings == 1);
}

void test_classes(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  const std::size_t classes = static_cast<std::size_t>(model.config().classes);
  std::vector<std::int64_t> labels(classes);
  std::iota(labels.begin(), labels.end(), 0);
  tarflow::SampleOptions options;
  options.seed = 2;
  options.guidance = 1.0;
  const std::vector<float> images = sampler.sample(static_cast<std::int64_t>(classes), labels, options);
  const std::vector<double> posteriors = sampler.classify(images);
  const std::vector<double> log_q = sampler.log_prob(images, labels);
  std::size_t right = 0;
  for (std::size_t image = 0; image < classes; ++image) {
    const double* row = posteriors.data() + image * classes;
    double sum = 0.0;
    std::size_t best = 0;
    for (std::size_t label = 0; label < classes; ++label) {
      sum += std::exp(row[label]);
      if (row[label] > row[best]) best = label;
    }
    CHECK(std::fabs(sum - 1.0) < 1e-12);
    right += best == image ? 1 : 0;
    // By Bayes' rule from the densities themselves.
    const std::vector<float> one(images.begin() + static_cast<std::ptrdiff_t>(image * model.dims()),
                                 images.begin() + static_cast<std::ptrdiff_t>((image + 1) * model.dims()));
    const double other = sampler.log_prob(one, {static_cast<std::int64_t>((image + 1) % classes)})[0];
    CHECK(std::fabs((row[image] - row[(image + 1) % classes]) - (log_q[image] - other)) < 1e-2);
  }
  CHECK(right >= classes - 1);
}

int throwing(const tarflow_step*, void*) { throw 1; }

void test_statuses(const tarflow::Model& model, const std::string& bundle) {
  tarflow_sampler* sampler = nullptr;
  CHECK(noted(tarflow_sampler_create(model.get(), &sampler)) == TARFLOW_OK);
  std::vector<float> image(model.dims());
  tarflow_sample_options options;
  tarflow_sample_options_init(&options);
  options.guide = 7;
  CHECK_FAILS(noted(tarflow_sampler_sample(sampler, 1, nullptr, &options, image.data(), image.size())),
              TARFLOW_ERROR_INPUT, "guide must be");
  tarflow_sample_options_init(&options);
  options.on_step = throwing;  // against the rules, and still no exception comes through
  CHECK_FAILS(noted(tarflow_sampler_sample(sampler, 1, nullptr, &options, image.data(), image.size())),
              TARFLOW_ERROR_INTERNAL, "unknown failure");
  options.on_step = nullptr;
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, &options, image.data(), image.size()) == TARFLOW_OK);
  tarflow_report report;
  report.struct_size = 4;
  CHECK_FAILS(tarflow_sampler_report(sampler, &report), TARFLOW_ERROR_INPUT, "report.struct_size is 4");
  tarflow_engine engine;
  engine.struct_size = sizeof engine + 8;
  CHECK_FAILS(tarflow_model_engine(model.get(), &engine), TARFLOW_ERROR_INPUT, "engine.struct_size");
  CHECK_FAILS(tarflow_sampler_classify(sampler, 1, image.data(), nullptr), TARFLOW_ERROR_INPUT, "must not be NULL");
  tarflow_model* other = nullptr;
  tarflow_model_options missing;
  tarflow_model_options_init(&missing);
  missing.engine = "ort-cpu";
  missing.ort_library = "/nowhere/libonnxruntime.so";
  CHECK_FAILS(noted(tarflow_model_open(bundle.c_str(), &missing, &other)), TARFLOW_ERROR_ENGINE, "/nowhere");
  CHECK_FAILS(noted(tarflow_model_open((bundle + "/nowhere").c_str(), nullptr, &other)), TARFLOW_ERROR_BUNDLE,
              "no such");
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  provoked.insert(TARFLOW_ERROR_MEMORY);  // sanitizers map terabytes: no limit can be set
#else
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  rlimit limited = before;
  limited.rlim_cur = rlim_t{2} << 30;
  CHECK(setrlimit(RLIMIT_AS, &limited) == 0);
  options.batch_size = 1 << 20;  // three gigabytes of noise
  const std::size_t length = model.dims() << 20;
  CHECK_FAILS(noted(tarflow_sampler_sample(sampler, 1 << 20, nullptr, &options, image.data(), length)),
              TARFLOW_ERROR_MEMORY, "no memory");
  setrlimit(RLIMIT_AS, &before);
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, nullptr, image.data(), image.size()) == TARFLOW_OK);
#endif
  tarflow_sampler_free(sampler);
  for (tarflow_status status = TARFLOW_OK; status <= TARFLOW_ERROR_INTERNAL; ++status) {
    CHECK(provoked.count(status) == 1);
    CHECK(std::string(tarflow_status_name(status)) != "unknown");
  }
  CHECK(std::string(tarflow_status_name(7)) == "unknown");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return finish([&] {
    test_log(argv[1], argv[2]);
    test_overflow(argv[1], argv[2]);
    const tarflow::Model model = open_on(argv[2], argv[1]);
    test_cancel(model);
    test_cancel_encoding(model);
    test_busy(model);
    test_classes(model);
    test_statuses(model, argv[1]);
  });
}

// libtarflow for C++17: move-only objects over tarflow.h.
//
//   #include <cstdio>
//   #include <tarflow/tarflow.hpp>
//
//   int main() try {
//     const tarflow::Model model("mnist.tarflow");
//     tarflow::Sampler sampler(model);
//     tarflow::SampleOptions options;
//     options.guidance = 1.5;
//     options.on_step = [](const tarflow_step& step) { return step.step < 1000; };  // returning false cancels
//     const std::vector<float> images = sampler.sample(2, {3, 7}, options);         // [2, C, height, width]
//     const std::vector<double> log_prob = sampler.log_prob(images, {3, 7});        // [2], nats
//     std::printf("log-likelihoods: %.1f %.1f nats\n", log_prob[0], log_prob[1]);
//   } catch (const tarflow::Error& error) {
//     std::fprintf(stderr, "error: %s\nhint: %s\n", error.what(), error.hint().c_str());
//     return 1;
//   }
//
// Every failure throws tarflow::Error, with a code and a hint. Axes, threading rules and units are those of tarflow.h.
#ifndef TARFLOW_TARFLOW_HPP
#define TARFLOW_TARFLOW_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tarflow/tarflow.h"

namespace tarflow {

class Error : public std::runtime_error {
 public:
  Error(tarflow_status code, const std::string& message, std::string hint)
      : std::runtime_error(message), code_(code), hint_(std::move(hint)) {}
  tarflow_status code() const noexcept { return code_; }
  const std::string& hint() const noexcept { return hint_; }

 private:
  tarflow_status code_;
  std::string hint_;
};

inline void check(tarflow_status status) {
  if (status != TARFLOW_OK) throw Error(status, tarflow_last_message(), tarflow_last_hint());
}

/// Called with each message of a model and its samplers, from several threads at once; its exceptions are ignored.
using OnLog = std::function<void(tarflow_log_level level, const char* text)>;

/// An opened bundle. It is immutable: several threads may share it.
class Model {
 public:
  struct Options {
    std::string engine;       // native, ort-cpu; empty or auto: native if it reads the bundle's precision, else ort-cpu
    std::string ort_library;  // path of ONNX Runtime's library; empty searches, see docs/CPP.md
    OnLog on_log;             // empty: messages are dropped
    int threads = 0;          // processors to use; 0 means all that are available to this process
    bool verify_digests = true;
  };

  explicit Model(const std::string& path) : Model(path, Options()) {}
  Model(const std::string& path, const Options& options) {
    tarflow_model_options chosen;
    tarflow_model_options_init(&chosen);
    if (options.on_log) log_ = std::make_shared<const OnLog>(options.on_log);
    chosen.engine = options.engine.empty() ? nullptr : options.engine.c_str();
    chosen.ort_library = options.ort_library.empty() ? nullptr : options.ort_library.c_str();
    chosen.on_log = log_ ? &Model::log : nullptr;
    chosen.log_user_data = const_cast<OnLog*>(log_.get());
    chosen.threads = options.threads;
    chosen.skip_digests = options.verify_digests ? 0 : 1;
    tarflow_model* model = nullptr;
    check(tarflow_model_open(path.c_str(), &chosen, &model));
    handle_.reset(model);
    tarflow_config_init(&config_);
    check(tarflow_model_config(model, &config_));
  }
  Model(Model&&) noexcept = default;
  Model& operator=(Model&& other) noexcept {
    handle_ = std::move(other.handle_);  // first, because it may log while it is freed
    log_ = std::move(other.log_);
    config_ = other.config_;
    return *this;
  }
  const tarflow_config& config() const noexcept { return config_; }
  /// Values of one image: C * height * width, which is N * D.
  std::size_t dims() const noexcept { return static_cast<std::size_t>(config_.patches * config_.patch_values); }
  std::string label(std::int64_t number) const {
    const char* name = nullptr;
    check(tarflow_model_label(handle_.get(), number, &name));
    return name;
  }
  /// Describes the engine; the strings live as long as this object.
  tarflow_engine engine() const {
    tarflow_engine engine;
    tarflow_engine_init(&engine);
    check(tarflow_model_engine(handle_.get(), &engine));
    return engine;
  }
  const tarflow_model* get() const noexcept { return handle_.get(); }

 private:
  friend class Sampler;
  struct Free {
    void operator()(tarflow_model* model) const noexcept { tarflow_model_free(model); }
  };
  static void log(tarflow_log_level level, const char* text, void* user_data) noexcept {
    try {
      (*static_cast<const OnLog*>(user_data))(level, text);
    } catch (...) {  // nothing may be thrown through C
    }
  }
  std::shared_ptr<const OnLog> log_;  // samplers share it: they may outlive the model
  std::unique_ptr<tarflow_model, Free> handle_;
  tarflow_config config_{};
};

struct SampleOptions {
  std::uint64_t seed = 0;
  std::uint64_t first_index = 0;
  std::optional<std::vector<float>> noise;  // [n, N, D] in place of the seeded noise
  double guidance = 0.0;
  double attention_temperature = 1.0;
  int guide = TARFLOW_GUIDE_AB;
  bool anneal_guidance = false;
  bool denoise = true;
  std::int64_t batch_size = 0;
  std::function<bool(const tarflow_step&)> on_step;  // false cancels; its exceptions propagate out of sample()
};

/// How the last sample() went; the fields are those of tarflow_report.
struct Report {
  std::int64_t images = 0;
  std::vector<std::int64_t> non_finite;
};

struct Encoded {
  std::vector<float> z;         // [n, N, D]
  std::vector<double> log_det;  // [n], nats
};

/// Draws and scores images. One thread at a time, except for cancel(). Labels: none (the null class) or one per image.
class Sampler {
 public:
  explicit Sampler(const Model& model)
      : dims_(model.dims()), classes_(static_cast<std::size_t>(model.config().classes)), log_(model.log_) {
    tarflow_sampler* sampler = nullptr;
    check(tarflow_sampler_create(model.get(), &sampler));
    handle_.reset(sampler);
  }
  Sampler(Sampler&&) noexcept = default;
  Sampler& operator=(Sampler&& other) noexcept {
    handle_ = std::move(other.handle_);  // first, as in Model
    log_ = std::move(other.log_);
    dims_ = other.dims_;
    classes_ = other.classes_;
    return *this;
  }

  /// Images [n, C, height, width] in about [-1, 1], or tokens [n, N, D].
  std::vector<float> sample(std::int64_t n, const std::vector<std::int64_t>& labels = {},
                            const SampleOptions& options = {}) {
    if (n < 1) throw Error(TARFLOW_ERROR_INPUT, "n must be at least 1", "");
    check_length("labels", labels.size(), static_cast<std::size_t>(n), !labels.empty());
    Watch watch{&options.on_step, nullptr};
    tarflow_sample_options chosen;
    tarflow_sample_options_init(&chosen);
    chosen.seed = options.seed;
    chosen.first_index = options.first_index;
    if (options.noise) {
      check_length("noise", options.noise->size(), static_cast<std::size_t>(n) * dims_, true);
      chosen.noise = options.noise->data();
    }
    chosen.guidance = options.guidance;
    chosen.attention_temperature = options.attention_temperature;
    chosen.guide = options.guide;
    chosen.anneal_guidance = options.anneal_guidance ? 1 : 0;
    chosen.denoise = options.denoise ? 1 : 0;
    chosen.batch_size = options.batch_size;
    chosen.on_step = options.on_step ? &Sampler::call : nullptr;
    chosen.user_data = &watch;
    std::vector<float> images(static_cast<std::size_t>(n) * dims_);
    const tarflow_status status = tarflow_sampler_sample(handle_.get(), n, labels.empty() ? nullptr : labels.data(),
                                                         &chosen, images.data(), images.size());
    if (watch.thrown) std::rethrow_exception(watch.thrown);
    check(status);
    return images;
  }

  /// Cancel the call that another thread is making: within a step or block it throws Error (TARFLOW_ERROR_CANCELLED).
  void cancel() noexcept { tarflow_sampler_cancel(handle_.get()); }

  /// How the last sample() went.
  Report report() const {
    tarflow_report whole;
    tarflow_report_init(&whole);
    check(tarflow_sampler_report(handle_.get(), &whole));
    return {whole.images, {whole.non_finite, whole.non_finite + whole.non_finite_count}};
  }

  Encoded encode(const std::vector<float>& images, const std::vector<std::int64_t>& labels = {}) {
    const std::int64_t n = count(images, labels);
    Encoded result{std::vector<float>(images.size()), std::vector<double>(static_cast<std::size_t>(n))};
    check(tarflow_sampler_encode(handle_.get(), n, images.data(), labels.empty() ? nullptr : labels.data(),
                                 result.z.data(), result.log_det.data()));
    return result;
  }

  /// log q(image | label) [n], nats.
  std::vector<double> log_prob(const std::vector<float>& images, const std::vector<std::int64_t>& labels = {}) {
    const std::int64_t n = count(images, labels);
    std::vector<double> result(static_cast<std::size_t>(n));
    check(tarflow_sampler_log_prob(handle_.get(), n, images.data(), labels.empty() ? nullptr : labels.data(),
                                   result.data()));
    return result;
  }

  /// log p(class | image) [n, classes] under a uniform prior.
  std::vector<double> classify(const std::vector<float>& images) {
    const std::int64_t n = count(images, {});
    std::vector<double> result(static_cast<std::size_t>(n) * classes_);
    check(tarflow_sampler_classify(handle_.get(), n, images.data(), result.data()));
    return result;
  }

  /// images + strength * sigma^2 * grad log q; sigma 0 means the model's training noise.
  std::vector<float> denoise(const std::vector<float>& images, const std::vector<std::int64_t>& labels = {},
                             double sigma = 0.0, double strength = 1.0) {
    const std::int64_t n = count(images, labels);
    std::vector<float> result(images.size());
    check(tarflow_sampler_denoise(handle_.get(), n, images.data(), labels.empty() ? nullptr : labels.data(), sigma,
                                  strength, result.data()));
    return result;
  }

 private:
  struct Free {
    void operator()(tarflow_sampler* sampler) const noexcept { tarflow_sampler_free(sampler); }
  };
  struct Watch {
    const std::function<bool(const tarflow_step&)>* on_step;
    std::exception_ptr thrown;
  };

  static int call(const tarflow_step* step, void* user_data) noexcept {
    auto* watch = static_cast<Watch*>(user_data);
    try {
      return (*watch->on_step)(*step) ? 0 : 1;
    } catch (...) {  // nothing may be thrown through C: sample() rethrows it
      watch->thrown = std::current_exception();
      return 1;
    }
  }
  static void check_length(const char* name, std::size_t length, std::size_t expected, bool given) {
    if (given && length != expected)
      throw Error(TARFLOW_ERROR_INPUT, std::string(name) + " has " + std::to_string(length) + " values, expected " +
                                           std::to_string(expected), "");
  }
  std::int64_t count(const std::vector<float>& images, const std::vector<std::int64_t>& labels) const {
    if (images.empty() || images.size() % dims_ != 0)
      throw Error(TARFLOW_ERROR_INPUT, "images must hold a multiple of " + std::to_string(dims_) + " values", "");
    check_length("labels", labels.size(), images.size() / dims_, !labels.empty());
    return static_cast<std::int64_t>(images.size() / dims_);
  }

  std::size_t dims_, classes_;
  std::shared_ptr<const OnLog> log_;
  std::unique_ptr<tarflow_sampler, Free> handle_;
};

}  // namespace tarflow

#endif

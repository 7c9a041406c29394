// tarflow-sample: draw images from a bundle, with the core flags of `tarflow-infer`.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>
#include <nlohmann/json.hpp>
#include <random>

#include "arguments.hpp"
#include "pictures.hpp"

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
using tool::Arguments;

std::atomic<tarflow::Sampler*> running{nullptr};  // what an interrupt cancels

void interrupt(int) {
  if (tarflow::Sampler* sampler = running) sampler->cancel();
}

/// While it lives, SIGINT and SIGTERM cancel what the sampler does; after that they end the program as ever.
class Interruptible {
 public:
  explicit Interruptible(tarflow::Sampler& sampler) {
    running = &sampler;
    std::signal(SIGINT, interrupt);
    std::signal(SIGTERM, interrupt);
  }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
  ~Interruptible() {
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
    running = nullptr;
  }
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Seconds per step: the median, which leaves out what happens once, like opening a block's graph.
class Pace {
 public:
  void step(std::int64_t done) {
    const Clock::time_point now = Clock::now();
    const std::chrono::duration<double> passed = now - last_;
    if (done_ != 0) paces_.push_back(passed.count() / static_cast<double>(done - done_));
    done_ = done;
    last_ = now;
  }
  std::int64_t steps() const { return done_; }
  double seconds() {
    if (paces_.empty()) return 0.0;
    std::sort(paces_.begin(), paces_.end());
    return 0.5 * (paces_[(paces_.size() - 1) / 2] + paces_[paces_.size() / 2]);
  }

 private:
  std::int64_t done_ = 0;
  Clock::time_point last_;
  std::vector<double> paces_;
};

/// Columns of a near-square grid in which labels that repeat stand below each other; 0 where that is not near.
std::int64_t columns_of(std::int64_t count, std::int64_t period) {
  const double side = std::sqrt(static_cast<double>(count));
  const auto columns = period * std::max<std::int64_t>(1, std::llrint(side / static_cast<double>(period)));
  return 1 < period && period < count && static_cast<double>(columns) <= 3.0 * side ? columns : 0;
}

const char* guide_of(const Arguments& a) {
  return a.options.guide == TARFLOW_GUIDE_A ? "a" : a.options.guide == TARFLOW_GUIDE_B ? "b" : "ab";
}

const char* words(bool value) { return value ? "true" : "false"; }

/// How the images were made, as tarflow-infer writes it into PNG files.
tool::Text metadata(const Arguments& a, const tarflow::Model& model) {
  return {{"tarflow:digest", model.config().digest},
          {"tarflow:engine", model.engine().name},
          {"tarflow:precision", model.engine().precision},
          {"tarflow:seed", std::to_string(a.options.seed)},
          {"tarflow:first_index", std::to_string(a.options.first_index)},
          {"tarflow:guidance", tool::repr(a.options.guidance)},
          {"tarflow:guide", guide_of(a)},
          {"tarflow:attention_temperature", tool::repr(a.options.attention_temperature)},
          {"tarflow:anneal_guidance", words(a.options.anneal_guidance)},
          {"tarflow:denoise", words(a.options.denoise)},
          {"tarflow:decode", "sequential"}};
}

int run(int argc, char** argv) {
  Arguments a = tool::parse(argc, argv);
  const tool::Output target = tool::check_output(a.output, a.overwrite);
  a.options.seed = a.seed ? *a.seed : std::random_device()();
  a.model.on_log = [](tarflow_log_level level, const char* text) {
    if (level >= TARFLOW_LOG_WARNING) std::fprintf(stderr, "warning: %s\n", text);
  };
  const Clock::time_point began = Clock::now();
  const tarflow::Model model(a.bundle, a.model);
  const std::vector<std::string> names = tool::names_of(model);
  const std::vector<std::int64_t> listed =
      a.labels ? tool::parse_labels(*a.labels, model, names) : std::vector<std::int64_t>{};
  const std::int64_t n = a.n ? *a.n : listed.empty() ? 16 : static_cast<std::int64_t>(listed.size());
  if (static_cast<std::int64_t>(listed.size()) > n)
    throw tool::refused("--labels names " + std::to_string(listed.size()) + " labels for " + std::to_string(n) +
                            (n == 1 ? " image" : " images"),
                        "give at most one label per image");
  std::vector<std::int64_t> labels;
  std::vector<std::string> files;
  for (std::int64_t i = 0; i < n; ++i) {
    if (!listed.empty()) labels.push_back(listed[static_cast<std::size_t>(i) % listed.size()]);
    char name[32];
    const unsigned long long number = a.options.first_index + static_cast<std::uint64_t>(i);
    std::snprintf(name, sizeof name, "%06llu.png", number);
    files.emplace_back(name);
  }
  tool::check_pictures(target, model.config(), files);

  Pace pace;
  a.options.on_step = [&](const tarflow_step& step) {
    pace.step(step.step);
    return true;
  };
  tarflow::Sampler sampler(model);
  const double loading = seconds_since(began);
  const Clock::time_point started = Clock::now();
  const std::vector<float> images = [&] {
    const Interruptible while_sampling(sampler);
    return sampler.sample(n, labels, a.options);
  }();
  const double sampling = seconds_since(started);
  const std::int64_t columns = columns_of(n, listed.empty() ? 1 : static_cast<std::int64_t>(listed.size()));
  const std::vector<std::string> written =
      tool::write_pictures(target, images, model.config(), files, columns, metadata(a, model));
  if (a.json) {
    Json words_of = nullptr;
    for (const std::int64_t label : labels) {
      const bool unnamed = label < 0 || names.empty();
      const std::string number = label < 0 ? "null" : std::to_string(label);
      words_of.push_back(unnamed ? number : names[static_cast<std::size_t>(label)]);
    }
    const Json document = {
        {"bundle", a.bundle},
        {"engine", model.engine().name},
        {"precision", model.engine().precision},
        {"digest", model.config().digest},
        {"seed", a.options.seed},
        {"count", n},
        {"first_index", a.options.first_index},
        {"guidance", a.options.guidance},
        {"guide", guide_of(a)},
        {"attention_temperature", a.options.attention_temperature},
        {"anneal_guidance", a.options.anneal_guidance},
        {"denoise", a.options.denoise},
        {"batch_size", a.options.batch_size != 0 ? Json(a.options.batch_size) : Json()},
        {"non_finite", sampler.report().non_finite},
        {"labels", words_of},
        {"files", written},
        {"steps", pace.steps()},
        {"seconds", {{"load", loading}, {"sample", sampling}, {"per_step", pace.seconds()}}}};
    std::printf("%s\n", document.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
  }
  std::fprintf(stderr, "wrote %s: %lld image%s, seed %llu, %s, %.1f s, %.2f ms per step\n", a.output.c_str(),
               static_cast<long long>(n), n == 1 ? "" : "s", static_cast<unsigned long long>(a.options.seed),
               model.engine().name, sampling, 1e3 * pace.seconds());
  return std::fflush(stdout) == 0 ? 0 : 1;
}

int report(const char* message, const std::string& hint, int code) {
  std::fprintf(stderr, "error: %s\n", message);
  if (!hint.empty()) std::fprintf(stderr, "hint: %s\n", hint.c_str());
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) return std::fputs(tool::kUsage, stdout) < 0 ? 1 : 0;
    if (std::strcmp(argv[i], "--version") == 0)
      return std::printf("tarflow-sample %s\n", tarflow_version()) < 0 ? 1 : 0;
  }
  try {
    return run(argc, argv);
  } catch (const tarflow::Error& error) {
    if (error.code() == TARFLOW_ERROR_CANCELLED) {
      std::fprintf(stderr, "interrupted; nothing was written\n");
      return 130;
    }
    const bool failed = error.code() == TARFLOW_ERROR_MEMORY || error.code() == TARFLOW_ERROR_INTERNAL;
    return report(error.what(), error.hint(), failed ? 1 : 2);
  } catch (const std::bad_alloc&) {
    return report("out of memory", "run fewer images together: --batch-size", 1);
  } catch (const std::exception& error) {
    return report(error.what(), "", 1);
  }
}

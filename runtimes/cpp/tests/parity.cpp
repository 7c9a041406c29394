// The same numbers as Python: parity BUNDLE GOLDEN ENGINE [--exact], a file that golden.py wrote. With --exact it was
// written on this machine with this engine and ONNX Runtime, and every bit is asked for, but of posteriors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "check.hpp"
#include "golden.hpp"

using Json = Golden::Json;
using Labels = std::vector<std::int64_t>;

/// Compares the arrays of one case, and counts those whose bits are equal.
class Comparison {
 public:
  Comparison(const Golden& golden, bool exact) : golden_(golden), exact_(exact) {}

  template <typename T>
  void add(const Json& limits, const std::string& name, const std::vector<T>& got) {
    const std::vector<T> wanted = golden_.array<T>(name);
    const double limit = limits.at(name).at("limit").get<double>();
    const bool is_sum = sizeof(T) == sizeof(double);  // log-densities: relative to their size
    double worst = got.size() == wanted.size() ? 0.0 : INFINITY;
    for (std::size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
      const auto value = static_cast<double>(wanted[i]);
      const double scale = is_sum ? std::max(1.0, std::fabs(value)) : 1.0;
      const double difference = std::fabs(static_cast<double>(got[i]) - value) / scale;
      worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    }
    const bool equal = worst == 0.0 && std::memcmp(got.data(), wanted.data(), sizeof(T) * got.size()) == 0;
    ++arrays_;
    if (equal) ++equal_;
    else std::printf("%-16s %.3g (limit %.3g)\n", name.c_str(), worst, limit);
    // NumPy's exp and log, in the posteriors alone, are not the C library's to the last bit.
    const double here = exact_ ? (name == "log_posteriors" ? 1e-14 : 0.0) : limit;
    if (!(equal || (here > 0.0 && worst <= here))) ++failures;
  }
  void print(const std::string& engine) const {
    std::printf("%s, ONNX Runtime %s: %d of %d arrays are bit-identical\n", engine.c_str(), tarflow_ort_version(),
                equal_, arrays_);
  }

 private:
  const Golden& golden_;
  bool exact_;
  int arrays_ = 0;
  int equal_ = 0;
};

static Labels labels_of(const Json& arguments) {
  const Json labels = arguments.value("labels", Json());
  return labels.is_null() ? Labels() : labels.get<Labels>();
}

static std::vector<float> sample(tarflow::Sampler& sampler, const Json& arguments) {
  tarflow::SampleOptions options;
  options.seed = arguments.at("seed").get<std::uint64_t>();
  options.first_index = arguments.value("first_index", std::uint64_t{0});
  const Json guidance = arguments.value("guidance", Json::object());
  options.guidance = guidance.value("weight", 0.0);
  options.attention_temperature = guidance.value("attention_temperature", 1.0);
  const std::string guide = guidance.value("guide", "ab");
  options.guide = guide == "a" ? TARFLOW_GUIDE_A : guide == "b" ? TARFLOW_GUIDE_B : TARFLOW_GUIDE_AB;
  options.anneal_guidance = guidance.value("anneal", false);
  options.denoise = arguments.at("denoise").get<bool>();
  options.batch_size = arguments.value("batch_size", std::int64_t{0});
  return sampler.sample(arguments.at("n").get<std::int64_t>(), labels_of(arguments), options);
}

static void compare(const tarflow::Model& model, const Golden& golden, bool exact) {
  tarflow::Sampler sampler(model);
  Comparison comparison(golden, exact);
  for (const Json& entry : golden.cases()) {
    const std::string call = entry.at("call").get<std::string>();
    const Json& arguments = entry.at("arguments");
    const Json& limits = entry.at("arrays");
    if (call == "noise") {
      const auto n = arguments.at("n").get<std::int64_t>();
      std::vector<float> noise(static_cast<std::size_t>(n) * model.dims());
      tarflow::check(tarflow_noise(arguments.at("seed").get<std::uint64_t>(),
                                   arguments.at("first_index").get<std::uint64_t>(), n, model.config().patches,
                                   model.config().patch_values, noise.data()));
      comparison.add(limits, "noise", noise);
    } else if (call == "sample") {
      comparison.add(limits, entry.at("name").get<std::string>(), sample(sampler, arguments));
    } else {
      const std::vector<float> images = golden.array<float>(arguments.at("images").get<std::string>());
      const Labels labels = labels_of(arguments);
      if (call == "encode") {
        const tarflow::Encoded encoded = sampler.encode(images, labels);
        comparison.add(limits, "z", encoded.z);
        comparison.add(limits, "log_det", encoded.log_det);
      } else if (call == "log_prob") {
        comparison.add(limits, "log_prob", sampler.log_prob(images, labels));
      } else if (call == "classify") {
        comparison.add(limits, "log_posteriors", sampler.classify(images));
      } else if (call == "denoise") {
        comparison.add(limits, "denoised", sampler.denoise(images, labels, arguments.at("sigma").get<double>(),
                                                           arguments.at("strength").get<double>()));
      } else {
        throw std::runtime_error("the golden file asks for " + call);
      }
    }
  }
  comparison.print(model.engine().name);
}

int main(int argc, char** argv) {
  const bool exact = argc == 5 && std::string(argv[4]) == "--exact";
  if (argc != (exact ? 5 : 4)) return 2;
  return finish([&] { compare(open_on(argv[3], argv[1]), Golden(argv[2]), exact); });
}

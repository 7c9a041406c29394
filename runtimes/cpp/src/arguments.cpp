#include "arguments.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "error.hpp"

namespace tarflow::detail {
namespace {

std::string text_of(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

}  // namespace

void check_count(std::int64_t n) {
  if (n < 1 || n > INT32_MAX) throw input_error("n must be at least 1 and below 2^31, got " + std::to_string(n));
}

void check_first_index(std::uint64_t first_index, std::int64_t n) {
  if (first_index > UINT64_MAX - static_cast<std::uint64_t>(n - 1))
    throw input_error("first_index + n must stay below 2^64, got " + std::to_string(first_index));
}

void check_real(const char* name, double value, bool positive) {
  if (!std::isfinite(value) || value < 0.0 || (positive && value == 0.0))
    throw input_error(std::string(name) + " must be a finite number " + (positive ? "> 0" : ">= 0") + ", got " +
                      text_of(value));
}

void check_finite(const char* name, const float* values, std::int64_t count) {
  if (!std::all_of(values, values + count, [](float value) { return std::isfinite(value); }))
    throw input_error(std::string(name) + " holds values that are not finite");
}

Labels class_numbers(const std::int64_t* labels, std::int64_t n, const Config& config) {
  if (config.classes == 0) {
    if (labels != nullptr) throw input_error("labels were given, but the model has no classes", "pass NULL");
    return {};
  }
  Labels numbers(static_cast<std::size_t>(n), config.classes);
  for (std::size_t i = 0; i < numbers.size() && labels != nullptr; ++i) {
    if (labels[i] < -1 || labels[i] >= config.classes)
      throw input_error("label " + std::to_string(labels[i]) + " is not a class of the model",
                        "valid are 0 to " + std::to_string(config.classes - 1) + ", and -1 for the null class");
    if (labels[i] >= 0) numbers[i] = labels[i];
  }
  return numbers;
}

Guidance guidance_of(const tarflow_sample_options& options, const Labels& labels, const Config& config) {
  check_real("guidance", options.guidance, false);
  check_real("attention_temperature", options.attention_temperature, true);
  if (options.guide < TARFLOW_GUIDE_A || options.guide > TARFLOW_GUIDE_AB)
    throw input_error("guide must be TARFLOW_GUIDE_A, _B or _AB, got " + std::to_string(options.guide));
  const bool same =
      std::all_of(labels.begin(), labels.end(), [&](std::int64_t label) { return label == config.classes; });
  if (options.guidance > 0.0 && options.attention_temperature == 1.0 && same)
    throw input_error(std::string("guidance has nothing to compare: ") +
                          (config.classes != 0 ? "every label is the null class" : "the model has no classes") +
                          " and attention_temperature is 1",
                      std::string("set attention_temperature to another value than 1") +
                          (config.classes != 0 ? ", or give labels" : ""));
  return {options.guidance, options.attention_temperature, (options.guide & TARFLOW_GUIDE_A) != 0,
          (options.guide & TARFLOW_GUIDE_B) != 0, options.anneal_guidance != 0};
}

double sigma_of(const Config& config, const char* remedy) {
  if (config.noise_std > 0.0) return config.noise_std;
  throw input_error(std::string("this model ") +
                        (config.noise == "uniform" ? "was trained with uniform noise" : "has no known training noise") +
                        ", so that sigma of the denoiser is unknown",
                    remedy);
}

}  // namespace tarflow::detail

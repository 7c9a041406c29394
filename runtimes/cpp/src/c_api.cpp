// The C ABI: checks of what callers pass, and the one place where exceptions become statuses.
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "error.hpp"
#include "flow.hpp"
#include "noise.hpp"

using namespace tarflow::detail;

struct tarflow_model {
  std::shared_ptr<const Model> model;
};

struct tarflow_sampler {
  Sampler sampler;
};

namespace {

constexpr std::int64_t kBatchSize = 64;

thread_local std::string last_message;
thread_local std::string last_hint;

tarflow_status fail(tarflow_status status, const char* message, const char* hint) noexcept {
  try {
    last_message = message;
    last_hint = hint;
  } catch (...) {
    last_message.clear();
    last_hint.clear();
  }
  return status;
}

template <typename Work>
tarflow_status guarded(Work work) noexcept {
  try {
    work();
    return TARFLOW_OK;
  } catch (const Error& error) {
    return fail(error.status, error.what(), error.hint.c_str());
  } catch (const Ort::Exception& error) {
    return fail(TARFLOW_ERROR_ENGINE, error.what(), "check that the bundle and ONNX Runtime fit each other");
  } catch (const std::bad_alloc&) {
    return fail(TARFLOW_ERROR_MEMORY, "no memory", "use a smaller batch_size");
  } catch (const std::exception& error) {
    return fail(TARFLOW_ERROR_INTERNAL, error.what(), "");
  } catch (...) {
    return fail(TARFLOW_ERROR_INTERNAL, "unknown failure", "");
  }
}

void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw input_error(std::string(name) + " must not be NULL");
}

/// A struct of the caller, of this library's size: fields that the caller's header lacks keep their defaults.
template <typename Struct>
Struct given(const Struct* options, void (*defaults)(Struct*, size_t), const char* name) {
  Struct taken;
  defaults(&taken, sizeof taken);
  if (options == nullptr) return taken;
  const size_t size = options->struct_size;
  if (size < sizeof(size_t) || size > sizeof taken)
    throw input_error(std::string(name) + ".struct_size is " + std::to_string(size) + ", this library knows " +
                          std::to_string(sizeof taken),
                      "call the _init function first; a caller built with a newer header needs a newer libtarflow");
  std::memcpy(&taken, options, size);
  return taken;
}

template <typename Struct>
void put_defaults(const Struct& defaults, Struct* options, size_t size) {
  if (options == nullptr || size < sizeof(size_t)) return;
  std::memset(options, 0, size);
  std::memcpy(options, &defaults, std::min(size, sizeof defaults));
  options->struct_size = size;
}

int usable_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

Labels class_numbers(const int64_t* labels, int64_t n, const Config& config) {
  if (config.classes == 0) {
    if (labels != nullptr) throw input_error("labels were given, but the model has no classes", "pass NULL");
    return {};
  }
  Labels numbers(static_cast<size_t>(n), config.classes);
  for (size_t i = 0; i < numbers.size() && labels != nullptr; ++i) {
    if (labels[i] < -1 || labels[i] >= config.classes)
      throw input_error("label " + std::to_string(labels[i]) + " is not a class of the model",
                        "valid are 0 to " + std::to_string(config.classes - 1) + ", and -1 for the null class");
    if (labels[i] >= 0) numbers[i] = labels[i];
  }
  return numbers;
}

Labels part(const Labels& labels, int64_t start, int64_t count) {
  if (labels.empty()) return {};
  return Labels(labels.begin() + start, labels.begin() + start + count);
}

void check_count(int64_t n) {
  if (n < 1 || n > INT32_MAX) throw input_error("n must be at least 1 and below 2^31, got " + std::to_string(n));
}

void check_real(const char* name, double value, bool positive) {
  if (!std::isfinite(value) || value < 0.0 || (positive && value == 0.0))
    throw input_error(std::string(name) + " must be a finite number " + (positive ? "> 0" : ">= 0") + ", got " +
                      std::to_string(value));
}

void check_finite(const char* name, const float* values, int64_t count) {
  if (!std::all_of(values, values + count, [](float value) { return std::isfinite(value); }))
    throw input_error(std::string(name) + " holds values that are not finite");
}

double sigma_of(const Config& config, const char* remedy) {
  if (config.noise_std > 0.0) return config.noise_std;
  throw input_error(std::string("this model ") +
                        (config.noise == "uniform" ? "was trained with uniform noise" : "has no known training noise") +
                        ", so that sigma of the denoiser is unknown",
                    remedy);
}

Guidance guidance_of(const tarflow_sample_options& options, const Labels& labels, const Config& config) {
  check_real("guidance", options.guidance, false);
  check_real("attention_temperature", options.attention_temperature, true);
  if (options.guide < TARFLOW_GUIDE_A || options.guide > TARFLOW_GUIDE_AB)
    throw input_error("guide must be TARFLOW_GUIDE_A, _B or _AB, got " + std::to_string(options.guide));
  const bool same = std::all_of(labels.begin(), labels.end(), [&](int64_t label) { return label == config.classes; });
  if (options.guidance > 0.0 && options.attention_temperature == 1.0 && same)
    throw input_error(std::string("guidance has nothing to compare: ") +
                          (config.classes != 0 ? "every label is the null class" : "the model has no classes") +
                          " and attention_temperature is 1",
                      "set attention_temperature to another value than 1, or give labels");
  return {options.guidance, options.attention_temperature, (options.guide & TARFLOW_GUIDE_A) != 0,
          (options.guide & TARFLOW_GUIDE_B) != 0, options.anneal_guidance != 0};
}

/// Calls work(first image, count, patches, labels) for a few images at a time; the arguments are checked first.
template <typename Work>
void each_chunk(const Sampler& sampler, int64_t n, const float* images, const int64_t* labels, Work work) {
  const Config& config = sampler.model().config();
  check_count(n);
  need(images, "images");
  check_finite("images", images, n * config.dims());
  const Labels numbers = class_numbers(labels, n, config);
  const int64_t size = std::min(kBatchSize, sampler.images_per_run());
  for (int64_t start = 0; start < n; start += size) {
    const int64_t count = std::min(size, n - start);
    work(start, count, patchify(images + start * config.dims(), count, config), part(numbers, start, count));
  }
}

/// patches + scale * grad log q, a few images at a time.
void add_score(const Sampler& sampler, Floats& patches, const Labels& labels, float scale) {
  const Config& config = sampler.model().config();
  const int64_t batch = static_cast<int64_t>(patches.size()) / config.dims();
  for (int64_t start = 0; start < batch; start += sampler.images_per_run()) {
    const int64_t count = std::min(sampler.images_per_run(), batch - start);
    const auto first = patches.begin() + start * config.dims();
    const Floats score = sampler.score(Floats(first, first + count * config.dims()), part(labels, start, count));
    for (size_t i = 0; i < score.size(); ++i) first[static_cast<std::ptrdiff_t>(i)] += scale * score[i];
  }
}

void sample(const Sampler& sampler, int64_t n, const int64_t* labels, const tarflow_sample_options& options,
            float* images, size_t images_length) {
  const Config& config = sampler.model().config();
  const int64_t dims = config.dims();
  check_count(n);
  need(images, "images");
  if (images_length != static_cast<size_t>(n) * static_cast<size_t>(dims))
    throw input_error("images_length is " + std::to_string(images_length) + ", " + std::to_string(n) +
                      " images have " + std::to_string(n * dims) + " values");
  if (options.batch_size < 0) throw input_error("batch_size must be at least 0");
  const Labels numbers = class_numbers(labels, n, config);
  const Guidance guidance = guidance_of(options, numbers, config);
  const double sigma =
      options.denoise != 0 ? sigma_of(config, "leave the training noise in the images: denoise = 0") : 0.0;
  if (options.noise != nullptr) {
    if (options.seed != 0 || options.first_index != 0)
      throw input_error("noise was given, and so was seed or first_index", "leave one of them 0");
    check_finite("noise", options.noise, n * dims);
  } else if (options.first_index > UINT64_MAX - static_cast<uint64_t>(n - 1)) {
    throw input_error("first_index + n leaves [0, 2^64)");
  }
  const int64_t size = options.batch_size != 0 ? options.batch_size : kBatchSize;
  const int64_t chunks = (n - 1) / size + 1;
  tarflow_step step = {0, 0, chunks * config.blocks * (config.patches() - 1)};
  const OnStep on_step = [&](std::int64_t block) {
    step.block = block;
    ++step.step;
    if (options.on_step != nullptr && options.on_step(&step, options.user_data) != 0)
      throw Error(TARFLOW_ERROR_CANCELLED, "cancelled by on_step");
  };
  for (int64_t start = 0; start < n;) {
    const int64_t count = std::min(size, n - start);
    Floats latents(static_cast<size_t>(count * dims));
    for (int64_t image = 0; image < count; ++image) {
      float* out = latents.data() + image * dims;
      if (options.noise != nullptr)
        std::copy_n(options.noise + (start + image) * dims, dims, out);
      else
        standard_normal(options.seed, options.first_index + static_cast<uint64_t>(start + image), dims, out);
    }
    const Labels chosen = part(numbers, start, count);
    Floats patches = sampler.decode(std::move(latents), chosen, guidance, on_step);
    if (options.denoise != 0) add_score(sampler, patches, chosen, static_cast<float>(sigma * sigma));
    unpatchify(patches, count, config, images + start * dims);
    start += count;
  }
}

}  // namespace

extern "C" {

uint32_t tarflow_abi_version(void) { return TARFLOW_ABI_VERSION; }

const char* tarflow_version(void) { return TARFLOW_VERSION; }

const char* tarflow_status_name(tarflow_status status) {
  switch (status) {
    case TARFLOW_OK: return "ok";
    case TARFLOW_ERROR_INPUT: return "input";
    case TARFLOW_ERROR_BUNDLE: return "bundle";
    case TARFLOW_ERROR_ENGINE: return "engine";
    case TARFLOW_ERROR_CANCELLED: return "cancelled";
    case TARFLOW_ERROR_MEMORY: return "memory";
    case TARFLOW_ERROR_INTERNAL: return "internal";
    default: return "unknown";
  }
}

const char* tarflow_last_message(void) { return last_message.c_str(); }

const char* tarflow_last_hint(void) { return last_hint.c_str(); }

void tarflow_model_options_defaults(tarflow_model_options* options, size_t size) {
  put_defaults(tarflow_model_options{}, options, size);
}

void tarflow_sample_options_defaults(tarflow_sample_options* options, size_t size) {
  tarflow_sample_options defaults{};
  defaults.attention_temperature = 1.0;
  defaults.guide = TARFLOW_GUIDE_AB;
  defaults.denoise = 1;
  put_defaults(defaults, options, size);
}

tarflow_status tarflow_model_open(const char* path, const tarflow_model_options* options, tarflow_model** model) {
  return guarded([&] {
    need(path, "path");
    need(model, "model");
    *model = nullptr;
    const auto chosen = given(options, tarflow_model_options_defaults, "options");
    if (chosen.threads < 0) throw input_error("threads must be at least 0");
    Bundle bundle = open_bundle(path, chosen.skip_digests == 0);
    load_ort(chosen.ort_library != nullptr ? chosen.ort_library : "");
    const int threads = chosen.threads != 0 ? chosen.threads : usable_cpus();
    *model = new tarflow_model{std::make_shared<const Model>(std::move(bundle), threads)};
  });
}

void tarflow_model_free(tarflow_model* model) { delete model; }

tarflow_status tarflow_model_config(const tarflow_model* model, tarflow_config* config) {
  return guarded([&] {
    need(model, "model");
    need(config, "config");
    const size_t size = config->struct_size;
    if (size < sizeof(size_t) || size > sizeof *config)
      throw input_error("config.struct_size is " + std::to_string(size), "set it to sizeof(tarflow_config)");
    const Config& c = model->model->config();
    tarflow_config filled = {size,     c.image_size, c.image_channels, c.patch_size,     c.width,     c.blocks,
                             c.layers, c.head_dim,   c.classes,        c.patches(),      c.patch_values(), c.noise_std,
                             {}};
    std::memcpy(filled.digest, model->model->bundle().digest.c_str(), sizeof filled.digest);
    std::memcpy(config, &filled, size);
  });
}

tarflow_status tarflow_model_label(const tarflow_model* model, int64_t number, const char** name) {
  return guarded([&] {
    need(model, "model");
    need(name, "name");
    const auto& labels = model->model->config().labels;
    if (number < 0 || number >= static_cast<int64_t>(labels.size()))
      throw input_error("class " + std::to_string(number) + " has no name in this bundle");
    *name = labels[static_cast<size_t>(number)].c_str();
  });
}

const char* tarflow_ort_version(void) { return ort_version(); }

tarflow_status tarflow_sampler_create(const tarflow_model* model, tarflow_sampler** sampler) {
  return guarded([&] {
    need(model, "model");
    need(sampler, "sampler");
    *sampler = new tarflow_sampler{Sampler(model->model)};
  });
}

void tarflow_sampler_free(tarflow_sampler* sampler) { delete sampler; }

tarflow_status tarflow_sampler_sample(tarflow_sampler* sampler, int64_t n, const int64_t* labels,
                                      const tarflow_sample_options* options, float* images, size_t images_length) {
  return guarded([&] {
    need(sampler, "sampler");
    const auto chosen = given(options, tarflow_sample_options_defaults, "options");
    sample(sampler->sampler, n, labels, chosen, images, images_length);
  });
}

tarflow_status tarflow_sampler_encode(tarflow_sampler* sampler, int64_t n, const float* images, const int64_t* labels,
                                      float* z, double* log_det) {
  return guarded([&] {
    need(sampler, "sampler");
    const int64_t dims = sampler->sampler.model().config().dims();
    each_chunk(sampler->sampler, n, images, labels, [&](int64_t start, int64_t, Floats patches, const Labels& y) {
      std::vector<double> sums;
      const Floats u = sampler->sampler.encode(std::move(patches), y, sums);
      if (z != nullptr) std::copy(u.begin(), u.end(), z + start * dims);
      if (log_det != nullptr) std::copy(sums.begin(), sums.end(), log_det + start);
    });
  });
}

tarflow_status tarflow_sampler_log_prob(tarflow_sampler* sampler, int64_t n, const float* images,
                                        const int64_t* labels, double* log_prob) {
  return guarded([&] {
    need(sampler, "sampler");
    need(log_prob, "log_prob");
    each_chunk(sampler->sampler, n, images, labels, [&](int64_t start, int64_t, Floats patches, const Labels& y) {
      std::vector<double> log_det;
      const Floats u = sampler->sampler.encode(std::move(patches), y, log_det);
      const std::vector<double> sums = log_prob_of(u, log_det);
      std::copy(sums.begin(), sums.end(), log_prob + start);
    });
  });
}

tarflow_status tarflow_sampler_denoise(tarflow_sampler* sampler, int64_t n, const float* images, const int64_t* labels,
                                       double sigma, double strength, float* denoised) {
  return guarded([&] {
    need(sampler, "sampler");
    need(denoised, "denoised");
    const Config& config = sampler->sampler.model().config();
    check_real("strength", strength, false);
    check_real("sigma", sigma, false);
    const double noise = sigma > 0.0 ? sigma : sigma_of(config, "pass sigma");
    const auto scale = static_cast<float>(strength * (noise * noise));
    each_chunk(sampler->sampler, n, images, labels, [&](int64_t start, int64_t count, Floats patches, const Labels& y) {
      add_score(sampler->sampler, patches, y, scale);
      unpatchify(patches, count, config, denoised + start * config.dims());
    });
  });
}

tarflow_status tarflow_noise(uint64_t seed, uint64_t first_index, int64_t n, int64_t patches, int64_t patch_values,
                             float* noise) {
  return guarded([&] {
    need(noise, "noise");
    check_count(n);
    if (patches < 1 || patch_values < 1 || patches > (int64_t{1} << 34) / patch_values)
      throw input_error("patches and patch_values must be positive, and an image have at most 2^34 values");
    if (first_index > UINT64_MAX - static_cast<uint64_t>(n - 1)) throw input_error("first_index + n leaves [0, 2^64)");
    for (int64_t image = 0; image < n; ++image)
      standard_normal(seed, first_index + static_cast<uint64_t>(image), patches * patch_values,
                      noise + image * patches * patch_values);
  });
}

}  // extern "C"

// The C ABI of samplers.
#include <cmath>

#include "arguments.hpp"
#include "c_api.hpp"
#include "decode.hpp"
#include "density.hpp"
#include "noise.hpp"

using namespace tarflow::detail;

namespace {

constexpr int64_t kBatchSize = 64;

Labels part(const Labels& labels, int64_t start, int64_t count) {
  if (labels.empty()) return {};
  return Labels(labels.begin() + start, labels.begin() + start + count);
}

/// Calls work(engine, call): one call at a time on a sampler.
template <typename Work>
tarflow_status on_sampler(tarflow_sampler* sampler, Work work) noexcept {
  return guarded([&] {
    need(sampler, "sampler");
    if (!sampler->call.begin())
      throw input_error("the sampler is in a call already", "make one sampler for each thread");
    struct End {
      Call& call;
      ~End() { call.end(); }
    } const end{sampler->call};
    work(*sampler->engine, sampler->call);
  });
}

/// How many chunks of n images, equal to within one, have at most `size` each; chunk i begins at image n * i / chunks.
int64_t chunks_of(int64_t n, int64_t size) { return (n - 1) / size + 1; }

/// Calls work(first image, count, patches, labels) for a few images at a time; the arguments are checked first.
template <typename Work>
void each_chunk(const Engine& engine, int64_t n, const float* images, const int64_t* labels, Work work) {
  const Config& config = engine.config();
  check_count(n);
  need(images, "images");
  check_finite("images", images, n * config.dims());
  const Labels numbers = class_numbers(labels, n, config);
  const int64_t chunks = chunks_of(n, kBatchSize);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = n * chunk / chunks, count = n * (chunk + 1) / chunks - start;
    work(start, count, patchify(images + start * config.dims(), count, config), part(numbers, start, count));
  }
}

void add_score(const Engine& engine, Floats& patches, const Labels& labels, float scale, const Call& call) {
  const Floats gradient = score(engine, patches, labels, call);
  for (size_t i = 0; i < patches.size(); ++i) patches[i] += scale * gradient[i];
}

/// Log q [n] of n images under one label each.
void log_probs(const Engine& engine, int64_t n, const float* images, const int64_t* labels, const Call& call,
               double* log_prob) {
  each_chunk(engine, n, images, labels, [&](int64_t start, int64_t, Floats patches, const Labels& y) {
    std::vector<double> log_det;
    const Floats u = encode_patches(engine, std::move(patches), y, call, log_det);
    const std::vector<double> sums = log_prob_of(u, log_det);
    std::copy(sums.begin(), sums.end(), log_prob + start);
  });
}

/// Images of [n, ...] that hold a value that is not finite; the log says how many.
std::vector<int64_t> find_non_finite(const Engine& engine, int64_t n, const float* images) {
  const int64_t dims = engine.config().dims();
  std::vector<int64_t> found;
  for (int64_t image = 0; image < n; ++image) {
    const float* values = images + image * dims;
    if (!std::all_of(values, values + dims, [](float one) { return std::isfinite(one); })) found.push_back(image);
  }
  if (!found.empty())
    engine.logger()(TARFLOW_LOG_WARNING, std::to_string(found.size()) + " of " + std::to_string(n) +
                                             " images hold values that are not finite: the model overflowed");
  return found;
}

void sample(const Engine& engine, int64_t n, const int64_t* labels, const tarflow_sample_options& options,
            float* images, size_t images_length, Call& call) {
  const Config& config = engine.config();
  const int64_t dims = config.dims();
  check_count(n);
  need(images, "images");
  if (images_length != static_cast<size_t>(n) * static_cast<size_t>(dims))
    throw input_error("images_length is " + std::to_string(images_length) + ", " + std::to_string(n) +
                      " images have " + std::to_string(n * dims) + " values");
  if (options.batch_size < 0)
    throw input_error("batch_size must be at least 0, got " + std::to_string(options.batch_size));
  const Labels numbers = class_numbers(labels, n, config);
  DecodeInputs inputs{{}, guidance_of(options, numbers, config), {}, call};
  const double sigma =
      options.denoise != 0 ? sigma_of(config, "leave the training noise in the images: denoise = 0") : 0.0;
  if (options.noise != nullptr) {
    if (options.seed != 0 || options.first_index != 0)
      throw input_error("noise was given, and so was seed or first_index", "leave one of them 0");
    check_finite("noise", options.noise, n * dims);
  }
  check_first_index(options.first_index, n);
  if (options.denoise != 0) engine.prepare_vjp();
  const int64_t size = options.batch_size != 0 ? options.batch_size : kBatchSize;
  const int64_t chunks = chunks_of(n, size), steps = config.blocks * (config.patches - 1);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = n * chunk / chunks, count = n * (chunk + 1) / chunks - start;
    Floats latents(static_cast<size_t>(count * dims));
    for (int64_t image = 0; image < count; ++image) {
      float* out = latents.data() + image * dims;
      if (options.noise != nullptr)
        std::copy_n(options.noise + (start + image) * dims, dims, out);
      else
        standard_normal(options.seed, options.first_index + static_cast<uint64_t>(start + image), dims, out);
    }
    if (options.on_step != nullptr) {
      inputs.on_done = [&, chunk](int64_t block, int64_t done) {
        const tarflow_step step = {block, chunk * steps + done, chunks * steps};
        if (options.on_step(&step, options.user_data) != 0)
          throw Error(TARFLOW_ERROR_CANCELLED, "cancelled by on_step");
      };
    }
    inputs.labels = part(numbers, start, count);
    Floats patches = decode_patches(engine, std::move(latents), inputs);
    if (options.denoise != 0)
      add_score(engine, patches, inputs.labels, static_cast<float>(sigma * sigma), call);
    unpatchify(patches, count, config, images + start * dims);
  }
}

}  // namespace

extern "C" {

tarflow_status tarflow_sampler_create(const tarflow_model* model, tarflow_sampler** sampler) {
  return guarded([&] {
    need(sampler, "sampler");
    *sampler = nullptr;
    need(model, "model");
    auto made = std::make_unique<tarflow_sampler>();
    made->engine = model->engine;
    *sampler = made.release();
  });
}

void tarflow_sampler_free(tarflow_sampler* sampler) { delete sampler; }

void tarflow_sampler_cancel(tarflow_sampler* sampler) {
  if (sampler != nullptr) sampler->call.cancel();
}

void tarflow_sample_options_defaults(tarflow_sample_options* options, size_t size) {
  tarflow_sample_options defaults{};
  defaults.attention_temperature = 1.0;
  defaults.guide = TARFLOW_GUIDE_AB;
  defaults.denoise = 1;
  put_defaults(defaults, options, size);
}

tarflow_status tarflow_sampler_sample(tarflow_sampler* sampler, int64_t n, const int64_t* labels,
                                      const tarflow_sample_options* options, float* images, size_t images_length) {
  return on_sampler(sampler, [&](const Engine& engine, Call& call) {
    sampler->images = 0;
    sampler->non_finite.clear();
    const auto chosen = given(options, tarflow_sample_options_defaults, "options");
    sample(engine, n, labels, chosen, images, images_length, call);
    sampler->non_finite = find_non_finite(engine, n, images);
    sampler->images = n;
  });
}

tarflow_status tarflow_sampler_report(const tarflow_sampler* sampler, tarflow_report* report) {
  return guarded([&] {
    need(sampler, "sampler");
    put({0, sampler->images, static_cast<int64_t>(sampler->non_finite.size()), sampler->non_finite.data()}, report,
        "report");
  });
}

tarflow_status tarflow_sampler_encode(tarflow_sampler* sampler, int64_t n, const float* images, const int64_t* labels,
                                      float* z, double* log_det) {
  return on_sampler(sampler, [&](const Engine& engine, const Call& call) {
    const int64_t dims = engine.config().dims();
    each_chunk(engine, n, images, labels, [&](int64_t start, int64_t, Floats patches, const Labels& y) {
      std::vector<double> sums;
      const Floats u = encode_patches(engine, std::move(patches), y, call, sums);
      if (z != nullptr) std::copy(u.begin(), u.end(), z + start * dims);
      if (log_det != nullptr) std::copy(sums.begin(), sums.end(), log_det + start);
    });
  });
}

tarflow_status tarflow_sampler_log_prob(tarflow_sampler* sampler, int64_t n, const float* images,
                                        const int64_t* labels, double* log_prob) {
  return on_sampler(sampler, [&](const Engine& engine, const Call& call) {
    need(log_prob, "log_prob");
    log_probs(engine, n, images, labels, call, log_prob);
  });
}

tarflow_status tarflow_sampler_denoise(tarflow_sampler* sampler, int64_t n, const float* images, const int64_t* labels,
                                       double sigma, double strength, float* denoised) {
  return on_sampler(sampler, [&](const Engine& engine, const Call& call) {
    need(denoised, "denoised");
    const Config& config = engine.config();
    check_real("strength", strength, false);
    check_real("sigma", sigma, false);
    const double noise = sigma > 0.0 ? sigma : sigma_of(config, "pass sigma");
    const auto scale = static_cast<float>(strength * (noise * noise));
    each_chunk(engine, n, images, labels, [&](int64_t start, int64_t count, Floats patches, const Labels& y) {
      add_score(engine, patches, y, scale, call);
      unpatchify(patches, count, config, denoised + start * config.dims());
    });
  });
}

tarflow_status tarflow_sampler_classify(tarflow_sampler* sampler, int64_t n, const float* images,
                                        double* log_posteriors) {
  return on_sampler(sampler, [&](const Engine& engine, const Call& call) {
    const int64_t classes = engine.config().classes;
    if (classes == 0)
      throw input_error("this model has no classes, so it cannot classify", "use a class-conditional model");
    need(log_posteriors, "log_posteriors");
    check_count(n);
    std::vector<double> column(static_cast<size_t>(n));
    for (int64_t label = 0; label < classes; ++label) {
      log_probs(engine, n, images, std::vector<int64_t>(column.size(), label).data(), call, column.data());
      for (int64_t image = 0; image < n; ++image)
        log_posteriors[image * classes + label] = column[static_cast<size_t>(image)];
    }
    for (int64_t image = 0; image < n; ++image) {
      double* row = log_posteriors + image * classes;
      const double most = *std::max_element(row, row + classes);
      double sum = 0.0;
      for (int64_t label = 0; label < classes; ++label) sum += std::exp(row[label] -= most);
      for (int64_t label = 0; label < classes; ++label) row[label] -= std::log(sum);
    }
  });
}

}  // extern "C"

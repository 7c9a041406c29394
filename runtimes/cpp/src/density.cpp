#include "density.hpp"

#include <cmath>

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// The sum that NumPy makes of `count` doubles, visited by their place: pairwise, eight at a time at the bottom. In
/// this order the log-densities are those of the Python runtime to the last bit.
template <typename Value>
double pairwise_sum(std::size_t first, std::size_t count, Value value) {
  if (count < 8) {
    double sum = -0.0;
    for (std::size_t i = 0; i < count; ++i) sum += value(first + i);
    return sum;
  }
  if (count <= 128) {
    double sums[8];
    for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] = value(first + lane);
    std::size_t i = 8;
    for (; i + 8 <= count; i += 8) {
      for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += value(first + i + lane);
    }
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < count; ++i) sum += value(first + i);
    return sum;
  }
  const std::size_t half = count / 2 - count / 2 % 8;
  return pairwise_sum(first, half, value) + pairwise_sum(first + half, count - half, value);
}

/// Derivative of log N(u; 0, 1) with respect to z = u * sqrt(prior): -z / prior.
Floats last_cotangent(const Engine& engine, Floats z) {
  const Floats& prior = engine.bundle().prior;
  for (std::size_t i = 0; i < z.size(); ++i) z[i] = prior.empty() ? -z[i] : -z[i] / prior[i % prior.size()];
  return z;
}

/// Calls visit(index in the images, index in the patches) for every value of a batch.
template <typename Visit>
void each_value(std::int64_t batch, const Config& c, Visit visit) {
  if (c.is_tokens) {
    for (std::int64_t i = 0; i < batch * c.dims(); ++i) visit(size(i), size(i));
    return;
  }
  const std::int64_t p = c.patch_size, across = c.image_size / p;
  std::int64_t pixel = 0;
  for (std::int64_t image = 0; image < batch; ++image)
    for (std::int64_t channel = 0; channel < c.image_channels; ++channel)
      for (std::int64_t y = 0; y < c.image_size; ++y)
        for (std::int64_t x = 0; x < c.image_size; ++x, ++pixel) {
          const std::int64_t patch = (y / p) * across + x / p;
          visit(size(pixel), size(image * c.dims() + patch * c.patch_values + (channel * p + y % p) * p + x % p));
        }
}

}  // namespace

Floats encode_patches(const Engine& engine, Floats x, const Labels& labels, const Call& call,
                      std::vector<double>& log_det) {
  log_det.assign(size(engine.batch_of(x)), 0.0);
  for (std::int64_t block = 0; block < engine.config().blocks; ++block) {
    call.check();
    x = engine.forward(block, x, labels, call, log_det);
  }
  const Floats& prior = engine.bundle().prior;
  if (prior.empty()) return x;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] /= std::sqrt(prior[i % prior.size()]);
  const double log_prior =
      pairwise_sum(0, prior.size(), [&](std::size_t i) { return std::log(static_cast<double>(prior[i])); });
  for (double& value : log_det) value -= 0.5 * log_prior;
  return x;
}

std::vector<double> log_prob_of(const Floats& u, const std::vector<double>& log_det) {
  const std::size_t dims = u.size() / log_det.size();
  const double constant = 0.5 * std::log(2.0 * 3.141592653589793) * static_cast<double>(dims);
  std::vector<double> log_prob;
  for (std::size_t image = 0; image < log_det.size(); ++image) {
    const double square = pairwise_sum(
        image * dims, dims, [&](std::size_t i) { return static_cast<double>(u[i]) * static_cast<double>(u[i]); });
    log_prob.push_back(-0.5 * square - constant + log_det[image]);
  }
  return log_prob;
}

Floats score(const Engine& engine, const Floats& patches, const Labels& labels, const Call& call) {
  return engine.vjp(patches, labels, [&](Floats z) { return last_cotangent(engine, std::move(z)); }, call);
}

Floats patchify(const float* images, std::int64_t batch, const Config& config) {
  Floats patches(size(batch * config.dims()));
  each_value(batch, config, [&](std::size_t pixel, std::size_t value) { patches[value] = images[pixel]; });
  return patches;
}

void unpatchify(const Floats& patches, std::int64_t batch, const Config& config, float* images) {
  each_value(batch, config, [&](std::size_t pixel, std::size_t value) { images[pixel] = patches[value]; });
}

}  // namespace tarflow::detail

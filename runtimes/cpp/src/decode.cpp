#include "decode.hpp"

#include <algorithm>
#include <cmath>

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

}  // namespace

Floats Guidance::weights(std::int64_t patches) const {
  Floats values(size(2 * patches));
  for (std::int64_t i = 0; i < patches; ++i) {
    double g = weight;
    if (anneal) g = g * static_cast<double>(i + 1) / static_cast<double>(patches - 1);
    values[size(i)] = static_cast<float>(guide_a ? g : 0.0);
    values[size(patches + i)] = static_cast<float>(guide_b ? g : 0.0);
  }
  return values;
}

Floats Guidance::inverse_temperature() const {
  if (branches() == 1) return {1.0F};
  return {1.0F, static_cast<float>(1.0 / temperature)};
}

Floats decode_patches(const Engine& engine, Floats x, const DecodeInputs& inputs) {
  const Config& c = engine.config();
  const Floats& prior = engine.bundle().prior;
  for (std::size_t i = 0; i < x.size() && !prior.empty(); ++i) x[i] *= std::sqrt(prior[i % prior.size()]);
  Labels labels = inputs.labels;
  if (!labels.empty() && inputs.guidance.branches() == 2) labels.insert(labels.end(), labels.size(), c.classes);
  const Floats weights = inputs.guidance.weights(c.patches);
  const Floats inverse_temperature = inputs.guidance.inverse_temperature();
  for (std::int64_t block = c.blocks - 1; block >= 0; --block) {
    const std::int64_t before = (c.blocks - 1 - block) * (c.patches - 1);
    OnStep on_step;
    if (inputs.on_done) on_step = [&inputs, block, before](std::int64_t done) { inputs.on_done(block, before + done); };
    engine.invert({block, labels, weights, inverse_temperature, std::move(on_step), inputs.call}, x);
  }
  return x;
}

}  // namespace tarflow::detail

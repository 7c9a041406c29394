#include "decode.hpp"

#include <algorithm>
#include <cmath>

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// The labels of one part of the batch, of both branches.
Labels part_of(const Labels& labels, std::int64_t batch, const Part& part) {
  Labels chosen;
  for (std::int64_t row = 0; row < static_cast<std::int64_t>(labels.size()); row += batch)
    chosen.insert(chosen.end(), labels.begin() + row + part.start, labels.begin() + row + part.stop);
  return chosen;
}

/// What the parts of a block share: labels [G, B], guidance [2, N], inverse_temperature [G].
struct BlockInputs {
  std::int64_t block = 0;
  const Labels& labels;
  const Floats& guidance;
  const Floats& inverse_temperature;
  WorkerPool::OnStep on_step;
  const Call* call = nullptr;
};

/// One patch after the other: z [B, N, D] -> x [B, N, D], both in the order of the data.
Floats inverse_block(const Engine& engine, const BlockInputs& inputs, const Floats& z) {
  const Config& c = engine.config();
  const std::int64_t batch = engine.batch_of(z), steps = c.patches - 1;
  const std::vector<Part> parts = engine.parts(batch, static_cast<std::int64_t>(inputs.inverse_temperature.size()));
  Floats x(z.size());
  WorkerPool pool(static_cast<std::int64_t>(parts.size()), inputs.on_step, inputs.call);
  const auto work = [&](std::int64_t index) {
    const Part& part = parts[size(index)];
    StepInputs given;
    given.noise = z.data() + part.start * c.dims();
    given.batch = part.count();
    given.labels = part_of(inputs.labels, batch, part);
    given.guidance = inputs.guidance.data();
    given.inverse_temperature = inputs.inverse_temperature;
    given.reversed = engine.bundle().blocks[size(inputs.block)].reversed;
    given.half_cache = engine.bundle().cache_dtype() == "float16";
    const std::unique_ptr<Stepper> stepper = engine.stepper(inputs.block, given, parts.size() == 1);
    for (std::int64_t done = 1; done <= steps; ++done) {
      stepper->advance();
      if (pool.stopped()) return;
      pool.report(index, done);
    }
    stepper->result(x.data() + part.start * c.dims());
  };
  pool.run(work, std::min(engine.workers(), static_cast<std::int64_t>(parts.size())));
  return x;
}

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
    WorkerPool::OnStep on_step;
    if (inputs.on_done) on_step = [&inputs, block, before](std::int64_t done) { inputs.on_done(block, before + done); };
    x = inverse_block(engine, {block, labels, weights, inverse_temperature, std::move(on_step), inputs.call}, x);
  }
  return x;
}

}  // namespace tarflow::detail

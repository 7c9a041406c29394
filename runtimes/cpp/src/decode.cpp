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

/// One patch after the other: z [B, N, D] -> x [B, N, D], both in image order.
Floats inverse_block(const Engine& engine, const BlockInputs& inputs, const Floats& z) {
  const Config& c = engine.config();
  const std::int64_t batch = engine.batch_of(z), steps = c.patches() - 1;
  const std::vector<Part> parts = engine.parts(batch, static_cast<std::int64_t>(inputs.inverse_temperature.size()));
  Floats x(z.size());
  Crew crew(static_cast<std::int64_t>(parts.size()), inputs.on_step, inputs.call);
  const auto run = [&](std::int64_t index) {
    const Part& part = parts[size(index)];
    StepInputs given;
    given.noise = z.data() + part.start * c.dims();
    given.batch = part.count();
    given.labels = part_of(inputs.labels, batch, part);
    given.guidance = inputs.guidance.data();
    given.inverse_temperature = inputs.inverse_temperature;
    given.reversed = engine.bundle().blocks[size(inputs.block)].reversed;
    given.half_cache = engine.bundle().half_cache;
    const std::unique_ptr<Stepper> stepper = engine.stepper(inputs.block, given, parts.size() == 1);
    for (std::int64_t done = 1; done <= steps; ++done) {
      stepper->advance();
      if (crew.stopped()) return;
      crew.report(index, done);
    }
    stepper->result(x.data() + part.start * c.dims());
  };
  crew.work(run, std::min(engine.workers(), static_cast<std::int64_t>(parts.size())));
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

void DecodeReport::extend(DecodeReport other, std::int64_t images) {
  for (std::int64_t& image : other.non_finite) non_finite.push_back(images + image);
  if (blocks.empty()) {
    blocks = std::move(other.blocks);
    return;
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    BlockReport& mine = blocks[i];
    BlockReport& theirs = other.blocks[i];
    mine.calls.insert(mine.calls.end(), theirs.calls.begin(), theirs.calls.end());
    mine.committed.insert(mine.committed.end(), theirs.committed.begin(), theirs.committed.end());
    mine.residual = std::max(mine.residual, theirs.residual);
    for (const std::int64_t image : theirs.sequential_images) mine.sequential_images.push_back(images + image);
  }
}

Floats decode_patches(const Engine& engine, Floats x, const DecodeInputs& inputs, DecodeReport& report) {
  const Config& c = engine.config();
  const Floats& prior = engine.bundle().prior;
  for (std::size_t i = 0; i < x.size() && !prior.empty(); ++i) x[i] *= std::sqrt(prior[i % prior.size()]);
  Labels labels = inputs.labels;
  if (!labels.empty() && inputs.guidance.branches() == 2) labels.insert(labels.end(), labels.size(), c.classes);
  const Floats weights = inputs.guidance.weights(c.patches());
  const Floats inverse_temperature = inputs.guidance.inverse_temperature();
  const std::int64_t steps = c.patches() - 1, batch = engine.batch_of(x);
  for (std::int64_t turn = 0; turn < c.blocks; ++turn) {
    const std::int64_t block = c.blocks - 1 - turn;
    BlockReport how;
    how.block = block;
    if (!inputs.plan.empty()) how.strategy = inputs.plan[size(block)];
    Crew::OnStep on_step;
    if (inputs.on_done) on_step = [&inputs, block, turn, steps](std::int64_t done) {
      inputs.on_done(block, turn * steps + done);
    };
    const BlockInputs given{block, labels, weights, inverse_temperature, std::move(on_step), inputs.call};
    if (how.strategy.parallel) {
      x = inverse_block_parallel(engine, given, x, how.strategy, how);
    } else {
      x = inverse_block(engine, given, x);
      how.calls.assign(size(batch), steps);
    }
    report.blocks.push_back(std::move(how));
  }
  for (std::int64_t image = 0; image < batch; ++image) {
    const float* values = x.data() + image * c.dims();
    if (!std::all_of(values, values + c.dims(), [](float one) { return std::isfinite(one); }))
      report.non_finite.push_back(image);
  }
  return x;
}

}  // namespace tarflow::detail

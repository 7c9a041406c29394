// Parallel decoding: a triangular fixed point, iterated on a window that slides over the patches of one image.
//
// In block order x_0 = z_0 and x_{i+1} = f_i(x_0, ..., x_i). One call of the step graph evaluates f on a window of
// patches at once, with the keys and values of the patches before it cached. The window starts at the last settled
// patch, so that what it yields first is exact: that patch is settled. The next one is settled as it stands when f, of
// settled patches only, yields the same within the tolerance; and so on, up to the first that moved, which takes its
// new value and is settled, too. Hence at most N - 1 calls, |x_{i+1} - f_i(x_0, ..., x_i)| <= tolerance for every
// patch, and the sequential answer at tolerance 0.
//
// A patch that is settled keeps the value that its cached key and value were computed from: no cache is ever stale.
#include <algorithm>
#include <cmath>

#include "decode.hpp"

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

}  // namespace

Settled settle(Windows& windows, const float* noise, std::int64_t count, std::int64_t values, const Strategy& strategy,
               const std::function<bool(std::int64_t)>& on_settled) {
  const std::int64_t window = strategy.window != 0 ? std::min(strategy.window, count - 1) : count - 1;
  const auto tolerance = static_cast<float>(strategy.tolerance);
  Settled made;
  Floats& x = made.patches;
  x.assign(noise, noise + count * values);
  if (strategy.from_zeros) std::fill(x.begin() + values, x.end(), 0.0F);
  Floats next(size(window * values));
  for (std::int64_t settled = 1; settled < count;) {
    const std::int64_t stop = std::min(settled - 1 + window, count - 1);
    const std::int64_t length = stop - (settled - 1);
    windows.evaluate(settled - 1, x.data() + (settled - 1) * values, length, next.data());
    if (!std::all_of(next.begin(), next.begin() + length * values, [](float one) { return std::isfinite(one); })) {
      made.overflowed = true;
      for (; settled < count; ++settled) {
        windows.evaluate(settled - 1, x.data() + (settled - 1) * values, 1, x.data() + settled * values);
        made.committed.push_back(1);
        if (!on_settled(settled)) break;
      }
      return made;
    }
    std::int64_t still = 0;  // the window's last patch has no key yet, so that it takes its value in any case
    for (; still < length - 1; ++still) {
      float moved = 0.0F;
      for (std::int64_t i = 0; i < values; ++i)
        moved = std::max(moved, std::fabs(next[size(still * values + i)] - x[size((settled + still) * values + i)]));
      if (!(moved <= tolerance)) break;
      made.residual = std::max(made.residual, static_cast<double>(moved));
    }
    std::copy(next.begin() + still * values, next.begin() + length * values,
              x.begin() + (settled + still) * values);
    settled += still + 1;
    made.committed.push_back(still + 1);
    if (!on_settled(settled - 1)) break;
  }
  return made;
}

Floats inverse_block_parallel(const Engine& engine, const BlockInputs& inputs, const Floats& z,
                              const Strategy& strategy, BlockReport& report) {
  const Config& c = engine.config();
  const std::int64_t images = engine.batch_of(z), patches = c.patches(), values = c.patch_values();
  const bool reversed = engine.bundle().blocks[size(inputs.block)].reversed;
  const auto turned = [&](const float* from, float* to) {  // image order to block order, and back
    for (std::int64_t i = 0; i < patches; ++i)
      std::copy_n(from + (reversed ? patches - 1 - i : i) * values, values, to + i * values);
  };
  std::vector<Settled> results(size(images));
  Floats x(z.size());
  Crew crew(images, inputs.on_step, inputs.call);
  const auto run = [&](std::int64_t image) {
    Floats noise(size(c.dims()));
    turned(z.data() + image * c.dims(), noise.data());
    StepInputs given;
    given.noise = noise.data();
    given.batch = 1;
    for (std::size_t row = size(image); row < inputs.labels.size(); row += size(images))
      given.labels.push_back(inputs.labels[row]);
    given.guidance = inputs.guidance.data();
    given.inverse_temperature = inputs.inverse_temperature;
    given.reversed = reversed;
    given.half_cache = engine.bundle().half_cache;
    const std::unique_ptr<Windows> windows = engine.windows(inputs.block, given, images == 1);
    results[size(image)] = settle(*windows, noise.data(), patches, values, strategy, [&](std::int64_t done) {
      crew.report(image, done);
      return !crew.stopped();
    });
    turned(results[size(image)].patches.data(), x.data() + image * c.dims());
  };
  crew.work(run, std::min(engine.workers(), images));
  for (std::int64_t image = 0; image < images; ++image) {
    Settled& settled = results[size(image)];
    report.calls.push_back(static_cast<std::int64_t>(settled.committed.size()));
    report.committed.push_back(std::move(settled.committed));
    report.residual = std::max(report.residual, settled.residual);
    if (settled.overflowed) report.sequential_images.push_back(image);
  }
  return x;
}

}  // namespace tarflow::detail

// The sampler: the loops over blocks and patches that turn noise into patches.
// x_0 = z_0;  x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2, block by block from the last to the first.
#pragma once

#include <functional>

#include "engine.hpp"
#include "plan.hpp"

namespace tarflow::detail {

/// a += g_i (a - a_u) and b += g_i (b - b_u), where (a_u, b_u) are the null class's; g_i = weight, or
/// weight (i + 1) / (N - 1) when `anneal`. The attention logits of the second branch are divided by `temperature`.
struct Guidance {
  double weight = 0.0;
  double temperature = 1.0;
  bool guide_a = true;
  bool guide_b = true;
  bool anneal = false;

  std::int64_t branches() const { return weight > 0.0 ? 2 : 1; }
  Floats weights(std::int64_t patches) const;  // [2, N]: of the step that yields patch i + 1
  Floats inverse_temperature() const;          // [G]
};

/// Hears how many of the K * (N - 1) steps are done, in the caller's thread; what it throws ends the run.
using OnDone = std::function<void(std::int64_t block, std::int64_t steps)>;

/// What all blocks of a run share.
struct DecodeInputs {
  Labels labels;  // [B], the null class as `classes`; empty without classes
  Guidance guidance;
  Plan plan;
  OnDone on_done;
  const Call* call = nullptr;
};

/// Standard normal latents [B, N, D] -> patches of the image [B, N, D], and how.
Floats decode_patches(const Engine& engine, Floats latents, const DecodeInputs& inputs, DecodeReport& report);

/// Invert one block by windows, each image by itself: z [B, N, D] -> x [B, N, D], both in image order.
/// `labels` are [G, B], `guidance` [2, N], `inverse_temperature` [G].
struct BlockInputs {
  std::int64_t block = 0;
  const Labels& labels;
  const Floats& guidance;
  const Floats& inverse_temperature;
  Crew::OnStep on_step;
  const Call* call = nullptr;
};
Floats inverse_block_parallel(const Engine& engine, const BlockInputs& inputs, const Floats& z,
                              const Strategy& strategy, BlockReport& report);

/// Patches [N, D] in block order and how they came about.
struct Settled {
  Floats patches;
  std::vector<std::int64_t> committed;
  double residual = 0.0;
  bool overflowed = false;
};

/// Invert one block for one image: noise [N, D] in block order, `count` = N. `on_settled` hears the number of patches
/// settled after the first; false ends the run.
Settled settle(Windows& windows, const float* noise, std::int64_t count, std::int64_t values, const Strategy& strategy,
               const std::function<bool(std::int64_t)>& on_settled);

}  // namespace tarflow::detail

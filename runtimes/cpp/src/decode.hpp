// The sampler: the loops over blocks and patches that turn noise into patches.
// x_0 = z_0;  x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2, block by block from the last to the first.
#pragma once

#include <functional>

#include "engine.hpp"

namespace tarflow::detail {

/// a += g_i (a - a_u) and b += g_i (b - b_u), where (a_u, b_u) are the null class's; g_i = weight, or
/// weight (i + 1) / (N - 1) when `anneal`. The attention logits of the second branch are divided by `temperature`.
struct Guidance {
  double weight = 0.0;
  double temperature = 1.0;
  bool guide_a = true;
  bool guide_b = true;
  bool anneal = false;

  std::int64_t branches() const { return static_cast<float>(weight) > 0.0F ? 2 : 1; }  // computed in float32
  Floats weights(std::int64_t patches) const;  // [2, N]: of the step that yields patch i + 1
  Floats inverse_temperature() const;          // [G]
};

/// What all blocks of a run share.
struct DecodeInputs {
  Labels labels;  // [B], the null class as `classes`; empty without classes
  Guidance guidance;
  /// Called in the caller's thread with how many of the K * (N - 1) steps are done; what it throws ends the run.
  std::function<void(std::int64_t block, std::int64_t steps)> on_done;
  Call& call;
};

/// Standard normal latents [B, N, D] -> patches of the image [B, N, D].
Floats decode_patches(const Engine& engine, Floats latents, const DecodeInputs& inputs);

}  // namespace tarflow::detail

/// LayerNorm of one row.
#pragma once

#include "simd.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

constexpr float NORM_EPSILON = 1e-5F;

/// y = (x - mean) / sqrt(variance + 1e-5), times gamma plus beta unless they are folded into what follows (null).
///
///     mean = sum(x) / W;   variance = sum((x - mean)^2) / W
///
/// Sums run over 16 lanes side by side. x is zero from W up to a multiple of 16, and so becomes y.
static void normalise(const float *x, const float *gamma, const float *beta, i64 width, float *y) {
  const i64 end = round_up(width, LANES);
  Floats sum = broadcast(0.0F);
  for (i64 i = 0; i < end; i += LANES) sum = sum + load(x + i);
  const Floats mean = broadcast(sum_of_lanes(sum) / static_cast<float>(width));

  for (i64 i = 0; i < end; i += LANES) store(y + i, load(x + i) - mean);
  for (i64 i = width; i < end; ++i) y[i] = 0.0F;
  Floats squares = broadcast(0.0F);
  for (i64 i = 0; i < end; i += LANES) squares = fma(load(y + i), load(y + i), squares);
  const float variance = sum_of_lanes(squares) / static_cast<float>(width);

  const Floats scale = broadcast(1.0F / __builtin_sqrtf(variance + NORM_EPSILON));
  for (i64 i = 0; i < end; i += LANES) {
    Floats scaled = load(y + i) * scale;
    if (gamma) scaled = fma(scaled, load(gamma + i), load(beta + i));
    store(y + i, scaled);
  }
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

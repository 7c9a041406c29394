// What the density gives, on patches [B, N, D] in the order of the data, and the way between images and patches.
// log q(x) = sum over dims of log N(u; 0, 1) + log|det|, u = z / sqrt(prior), all sums in nats and in float64.
#pragma once

#include "engine.hpp"

namespace tarflow::detail {

/// Patches -> latents u [B, N, D] and log|det du/dx| [B], nats.
Floats encode_patches(const Engine& engine, Floats patches, const Labels& labels, const Call& call,
                      std::vector<double>& log_det);

/// Log q [B], nats, of what `encode_patches` returned.
std::vector<double> log_prob_of(const Floats& u, const std::vector<double>& log_det);

/// The gradient of log q with respect to the patches. It starts from -u / sqrt(prior) and runs back through the blocks,
/// each of which adds that of its own log|det|.
Floats score(const Engine& engine, const Floats& patches, const Labels& labels, const Call& call);

/// Images [B, C, height, width] -> patches [B, N, D], row-major, each patch flattened channel first; and back. Tokens
/// are patches as they are.
Floats patchify(const float* images, std::int64_t batch, const Config& config);
void unpatchify(const Floats& patches, std::int64_t batch, const Config& config, float* images);

}  // namespace tarflow::detail

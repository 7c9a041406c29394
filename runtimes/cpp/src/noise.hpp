// The seeded noise of docs/NOISE.md.
#pragma once

#include <array>
#include <cstdint>

namespace tarflow::detail {

using Words = std::array<std::uint32_t, 4>;

/// Philox4x32-10.
Words philox(Words counter, std::uint32_t k0, std::uint32_t k1);

/// Standard normals of one image: `values` of them.
void standard_normal(std::uint64_t seed, std::uint64_t image, std::int64_t values, float* out);

}  // namespace tarflow::detail

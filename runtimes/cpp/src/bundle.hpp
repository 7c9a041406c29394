// Reads a bundle directory, and refuses one that is damaged or unsafe. The format is docs/BUNDLE.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tarflow::detail {

struct Config {
  std::int64_t image_size, image_channels, patch_size, width, blocks, layers, head_dim, classes;
  bool nvp;
  double noise_std;                 // 0 when unknown
  std::string noise;                // gaussian or uniform
  std::vector<std::string> labels;  // empty when there are no names
  std::int64_t patches() const { return (image_size / patch_size) * (image_size / patch_size); }
  std::int64_t patch_values() const { return image_channels * patch_size * patch_size; }
  std::int64_t dims() const { return patches() * patch_values(); }
  std::int64_t heads() const { return width / head_dim; }
};

struct Block {
  bool reversed;
  std::string forward, step, gradient, weights;  // absolute paths
};

struct Bundle {
  std::string path;  // absolute, without links
  Config config;
  bool half;        // float16 linear weights and their activations
  bool half_cache;  // float16 caches
  std::string digest;
  std::vector<Block> blocks;
  std::vector<float> prior;  // [N, D], or empty when the variance is one everywhere
};

/// Throws Error (TARFLOW_ERROR_BUNDLE) when anything in it is missing, damaged, unsafe or too new.
Bundle open_bundle(const std::string& path, bool verify_digests);

}  // namespace tarflow::detail

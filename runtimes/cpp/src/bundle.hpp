// Reads a bundle directory, and refuses one that is damaged or unsafe. The format is docs/BUNDLE.md, version 2.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace tarflow::detail {

struct Config {
  bool is_tokens;                                      // else images
  std::int64_t image_size, image_channels, patch_size;  // 0 for tokens
  std::int64_t patches, patch_values;                  // N, D
  std::int64_t width, blocks, layers, head_dim, classes;
  bool nvp;
  double noise_std;                 // 0 when unknown
  std::string noise;                // gaussian or uniform
  std::vector<std::string> labels;  // empty when there are no names
  std::int64_t dims() const { return patches * patch_values; }
  std::int64_t heads() const { return width / head_dim; }
};

/// An input or output of a graph. An axis is a number, or symbolic: letters of docs/BUNDLE.md.
struct Array {
  std::string name, dtype;
  std::vector<std::string> shape;
  bool operator==(const Array& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
};

/// A graph that serves every block, and whose weights are in the folder of the block.
struct Graph {
  std::string name;                          // as ort-cpu/step
  std::shared_ptr<const std::string> bytes;  // those that were compared with the digest
  std::vector<Array> inputs, outputs;        // sorted by name
};

/// Where a tensor lies in the weights of every block, in bytes.
struct Tensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::int64_t offset, bytes;
};

struct Block {
  bool reversed;
  std::string folder, weights;  // absolute paths
  std::int64_t bytes;           // of its weights
};

struct Bundle {
  std::string path;  // absolute, without links
  std::string digest;
  Config config;
  std::string precision;                // float32, float16, bfloat16 or int8
  std::map<std::string, Graph> graphs;  // of ort-cpu, by kind: forward, gradient, step, step_guided, step_tempered,
                                        // vjp_*; none in bfloat16, in which it does not compute
  std::map<std::string, Tensor> tensors;
  std::vector<Block> blocks;
  std::vector<float> prior;  // [N, D], or empty when the variance is one everywhere

  std::string name() const { return path.substr(path.rfind('/') + 1); }
  std::string cache_dtype() const { return precision == "int8" ? "float32" : precision; }
  /// A tensor of a block's weights, which must be float32. Throws Error (TARFLOW_ERROR_BUNDLE).
  std::vector<float> floats(const Block& block, const std::string& tensor) const;
};

/// Throws Error (TARFLOW_ERROR_BUNDLE) when anything in it is missing, damaged, unsafe, or of another version.
Bundle open_bundle(const std::string& path, bool verify_digests);

}  // namespace tarflow::detail

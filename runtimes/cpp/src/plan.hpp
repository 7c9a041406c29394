// How each flow block is inverted, and what came of it.
#pragma once

#include <cstdint>
#include <vector>

namespace tarflow::detail {

/// One patch after the other, or fixed-point iteration on a sliding window of patches; docs/DECODING.md.
struct Strategy {
  bool parallel = false;
  std::int64_t window = 0;   // patches; 0 is the whole block
  double tolerance = 1e-5;   // what counts as settled, maximum norm
  bool from_zeros = false;   // patches start as zeros instead of as the block's noise
};

/// A strategy for each block, blocks[k] that of block k; empty is sequential.
using Plan = std::vector<Strategy>;

/// How one block was inverted; `committed[i]` says how many patches each evaluation of image i settled.
struct BlockReport {
  std::int64_t block = 0;
  Strategy strategy;
  std::vector<std::int64_t> calls;                   // of each image, N - 1 when sequential
  std::vector<std::vector<std::int64_t>> committed;  // empty when sequential
  double residual = 0.0;                             // largest |x_{i+1} - (z_{i+1} exp(a_i) + b_i)|
  std::vector<std::int64_t> sequential_images;       // met a value that is not finite, and went on sequentially
};

/// The blocks in the order in which they ran, and the images that overflowed.
struct DecodeReport {
  std::vector<BlockReport> blocks;
  std::vector<std::int64_t> non_finite;

  /// Append the report of the images after the first `images`.
  void extend(DecodeReport other, std::int64_t images);
};

}  // namespace tarflow::detail

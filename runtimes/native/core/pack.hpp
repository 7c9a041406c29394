/// Packing: the tensors of a block's weights.bin -> panels, as drawn in layout.hpp.
#pragma once

#include "layout.hpp"

namespace tarflow_native {

/// What a bundle holds of a block.
struct Weights {
  const tarflow_native_tensor *tensors;
  i64 count;
  const unsigned char *bytes;
  i64 size;
};

/// Packs a block; `*culprit` becomes the name of the tensor that is at fault.
tarflow_native_status pack(const Shape &shape, Format format, const Weights &weights, unsigned char *packed,
                           const char **culprit);

} // namespace tarflow_native

// Stepper: one inverse of one block for a part of a batch, one patch after the other, on the portable step graph or on
// its rewrite for one patch at a time. All arrays are set up once; a step allocates nothing.
#pragma once

#include <memory>
#include <vector>

#include "bundle.hpp"
#include "cache_pool.hpp"
#include "session.hpp"

namespace tarflow::detail {

using Floats = std::vector<float>;
using Labels = std::vector<std::int64_t>;

/// What an inverse of one block starts from: noise [B, N, D] in image order, which must outlive it.
struct StepInputs {
  const float* noise = nullptr;
  std::int64_t batch = 0;
  Labels labels;                // [G, B], empty without classes
  const float* guidance = nullptr;  // [2, N]
  Floats inverse_temperature;   // [G]
  bool reversed = false;
  bool half_cache = false;

  std::int64_t branches() const { return static_cast<std::int64_t>(inverse_temperature.size()); }
  std::int64_t rows() const { return branches() * batch; }
  bool temperature() const;  // whether any is not 1
  ONNXTensorElementDataType cache_type() const {
    return half_cache ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

/// Rows that the rewritten graph is given per step: pos_embed [N, W] in block order, class_embed [classes + 1, W].
struct SequentialTables {
  Floats pos_embed;
  Floats class_embed;  // empty without classes
};

class Stepper {
 public:
  virtual ~Stepper() = default;
  /// Finish the next patch: x_{i+1} = z_{i+1} * exp(a_i) + b_i, i = 0 at first. At most N - 1 times.
  virtual void advance() = 0;
  /// Write the patches [B, N, D] in image order; those not finished yet hold their noise.
  virtual void result(float* patches) const = 0;
};

std::unique_ptr<Stepper> portable_stepper(std::shared_ptr<Session> session, const Config& config,
                                          const StepInputs& inputs);
std::unique_ptr<Stepper> sequential_stepper(std::shared_ptr<Session> session, const Config& config,
                                            const StepInputs& inputs, std::shared_ptr<const SequentialTables> tables,
                                            CachePool& pool);

/// The state of one inverse of one block for one image that is evaluated on windows of patches.
class Windows {
 public:
  virtual ~Windows() = default;
  /// Patches first .. first + length - 1 in block order -> the patches one further, both [length, D].
  /// Writes their keys and values, and reads those of the patches before them, which must have been written.
  virtual void evaluate(std::int64_t first, const float* patches, std::int64_t length, float* next) = 0;
};

/// The inputs' noise is that of one image, in block order; `reversed` says where that is the reverse of image order.
std::unique_ptr<Windows> portable_windows(std::shared_ptr<Session> session, const Config& config,
                                          const StepInputs& inputs);
std::unique_ptr<Windows> rewritten_windows(std::shared_ptr<Session> session, const Config& config,
                                           const StepInputs& inputs, std::shared_ptr<const SequentialTables> tables);

/// Rows of a query_factor buffer [rows, 3W]: 1/tau in the first W columns, 1 in the others; `repeat` rows a branch.
void fill_query_factor(Buffer& factor, const Floats& inverse_temperature, std::int64_t repeat, std::int64_t width);

/// Weights of each step, [N, 2D] (or [N, D] without nvp): g for a, then g for b, each D times.
Floats step_weights(const float* guidance, const Config& config);

}  // namespace tarflow::detail

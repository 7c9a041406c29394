// Stepper: one inverse of one block for a part of a batch, one patch after the other, on the graphs `step*` of ort-cpu.
// x_{i+1} = z_{i+1} * exp(a_i) + b_i. All arrays are set up once; a step allocates nothing.
#pragma once

#include <memory>
#include <vector>

#include "cache_pool.hpp"
#include "engine.hpp"
#include "session.hpp"

namespace tarflow::detail {

/// What an inverse of one block starts from: noise [B, N, D] in the order of the data, which must outlive it.
struct StepInputs {
  const float* noise = nullptr;
  std::int64_t batch = 0;
  Labels labels;                    // [G, B], empty without classes
  const float* guidance = nullptr;  // [2, N]: g for a and for b
  Floats inverse_temperature;       // [G]
  bool reversed = false;
  bool half_cache = false;

  std::int64_t branches() const { return static_cast<std::int64_t>(inverse_temperature.size()); }
  std::int64_t rows() const { return branches() * batch; }
  /// The graph that such an inverse runs on.
  const char* graph() const {
    return branches() == 1 ? "step" : inverse_temperature[1] == 1.0F ? "step_guided" : "step_tempered";
  }
};

/// What a block's embeddings are looked up in: pos_embed [N, W] in block order, class_embed [classes + 1, W].
struct EmbeddingTables {
  Floats pos_embed;
  Floats class_embed;  // empty without classes
};

/// Noise and finished patches in block order, [N, B, D]: a step reads and writes one contiguous slab.
class PatchLog {
 public:
  PatchLog(const StepInputs& inputs, const Config& config);
  std::int64_t slab() const { return batch_ * values_; }
  const float* noise(std::int64_t position) const { return noise_.data() + position * slab(); }
  float* finished(std::int64_t position) { return finished_.data() + position * slab(); }
  /// Write the patches [B, N, D] in the order of the data; those not finished yet are their noise.
  void result(float* patches) const;

 private:
  template <typename Visit>
  void each(Visit visit) const;
  bool reversed_;
  std::int64_t batch_, patches_, values_;
  Floats noise_, finished_;
};

class Stepper {
 public:
  Stepper(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs,
          std::shared_ptr<const EmbeddingTables> tables, CachePool& pool);
  ~Stepper();
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;
  /// Finish the next patch. At most N - 1 times.
  void advance();
  void result(float* patches) const { log_.result(patches); }

 private:
  void bind_caches(const Config& config, const StepInputs& inputs);
  void fill_query_factor(const Floats& inverse_temperature);

  PatchLog log_;
  std::shared_ptr<const EmbeddingTables> tables_;
  CachePool& pool_;
  std::int64_t step_ = 0, batch_, rows_count_, width_, values_;
  Floats weights_;     // of all steps, [N, 2D] or [N, D] without nvp: g for a, then g for b, each D times
  Floats class_rows_;  // [R, W]
  Buffer rows_, embedding_, z_, g_, lengths_, total_, query_factor_;
  std::vector<Buffer> caches_;
  Ort::Value next_;
  BoundRun run_;
};

}  // namespace tarflow::detail

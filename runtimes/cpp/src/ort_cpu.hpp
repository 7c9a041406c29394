// OrtCpuEngine: ONNX Runtime over the blocks of one bundle. Sessions are opened when first needed and share one arena.
//
// A batch is cut over single-threaded runs in threads of this process rather than over threads inside each operator:
// the parts then never wait for each other, and what a part keeps in its caches stays near one core.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cache_pool.hpp"
#include "engine.hpp"
#include "recent.hpp"
#include "session.hpp"
#include "stepper.hpp"

namespace tarflow::detail {

/// A part of a batch: images start .. stop - 1.
struct Part {
  std::int64_t start, stop;
  std::int64_t count() const { return stop - start; }
};

/// z of a block for some images, and the activations for its backward pass.
struct ForwardHalf {
  Floats z;
  Shape shape;  // [B, N, D]
  std::map<std::string, Ort::Value> kept;
  std::shared_ptr<Session> backward;

  /// The gradient of these images for a cotangent [B, N, D], once; frees what was kept.
  Floats backpropagate(const Floats& cotangent);
};

class OrtCpuEngine final : public Engine {
 public:
  /// Loads ONNX Runtime (load_ort, for `user`). Throws Error (ENGINE) also when the bundle has no graphs for it.
  OrtCpuEngine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger, const std::string& library,
               const char* user);
  const char* name() const override { return "ort-cpu"; }
  void invert(const Turn& turn, Floats& patches) const override;
  Floats forward(std::int64_t block, const Floats& patches, const Labels& labels, const Call& call,
                 std::vector<double>& log_det) const override;
  /// Cuts the batch into pieces whose activations can be kept, or recomputes them where one image's cannot.
  Floats vjp(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
             const Call& call) const override;

 private:
  using Named = std::vector<std::pair<std::string, const Floats*>>;

  std::vector<Part> parts(std::int64_t images, std::int64_t branches) const;
  std::int64_t vjp_images() const;
  ForwardHalf forward_half(std::int64_t block, const Floats& patches, const Labels& labels, bool alone) const;
  Floats vjp_recomputed(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
                        const Call& call) const;
  int threads_of(bool alone) const;
  std::map<std::string, Floats> run(std::int64_t block, const char* kind, const Named& arrays, const Labels& labels,
                                    const Call& call) const;
  std::shared_ptr<Session> session(std::int64_t block, const char* kind, int threads) const;
  std::shared_ptr<const EmbeddingTables> tables(std::int64_t block) const;

  std::int64_t block_bytes_, workers_;  // workers: parts of a batch that run faster side by side; 1 where they do not
  bool wide_;
  int operator_threads_;
  mutable CachePool caches_;
  mutable Recent<std::string, Session> sessions_;
  mutable std::mutex mutex_;  // of what follows
  mutable std::map<std::int64_t, std::shared_ptr<const EmbeddingTables>> tables_;
};

}  // namespace tarflow::detail

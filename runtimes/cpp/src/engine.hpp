// Engine: ONNX Runtime over the blocks of one bundle. Sessions are opened when first needed and share one arena.
//
// A batch is cut over single-threaded runs in threads of this process rather than over threads inside each operator:
// the parts then never wait for each other, and what a part keeps in its caches stays near one core.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "cache_pool.hpp"
#include "log.hpp"
#include "session.hpp"
#include "stepper.hpp"

namespace tarflow::detail {

/// A part of a batch: images start .. stop - 1.
struct Part {
  std::int64_t start, stop;
  std::int64_t count() const { return stop - start; }
};

/// `count` equal parts of the images, in order.
std::vector<Part> cut(std::int64_t images, std::int64_t count);

/// z of a block for some images, and the activations for its backward pass.
struct ForwardHalf {
  Floats z;
  Shape shape;  // [B, N, D]
  std::map<std::string, Ort::Value> kept;
  std::shared_ptr<Session> backward;

  /// The gradient of these images for a cotangent [B, N, D], once; frees what was kept.
  Floats way_back(const Floats& cotangent);
};

/// Every method may be called from several threads at once. Labels are [B], the null class as `classes`, and empty on
/// models without classes. Throws Error (TARFLOW_ERROR_ENGINE) when a graph cannot be opened or run.
class Engine {
 public:
  /// `threads` is how many processors to use; 0 is all that this process may use.
  Engine(Bundle bundle, int threads, Logger logger);
  const Bundle& bundle() const { return bundle_; }
  const Config& config() const { return bundle_.config; }
  const Logger& logger() const { return logger_; }
  int threads() const { return threads_; }
  /// The number of parts of a batch to run in parallel threads; 1 if that is not faster.
  std::int64_t workers() const { return workers_; }

  /// B of patches [B, N, D].
  std::int64_t batch_of(const Floats& patches) const;
  /// How to cut a batch for `stepper`.
  std::vector<Part> parts(std::int64_t images, std::int64_t branches) const;
  /// Start an inverse. `alone`: no other part runs meanwhile, so that this one may have all threads.
  std::unique_ptr<Stepper> stepper(std::int64_t block, const StepInputs& inputs, bool alone) const;
  /// Patches [B, N, D] -> z [B, N, D]; log|det| [B], nats, is added to `log_det`.
  Floats forward(std::int64_t block, const Floats& patches, const Labels& labels, std::vector<double>& log_det) const;
  /// Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D].
  Floats gradient(std::int64_t block, const Floats& patches, const Floats& cotangent, const Labels& labels) const;
  /// The most images for `vjp` such that the activations of all blocks fit; 0 to use `gradient` instead.
  std::int64_t vjp_images() const;
  /// Patches [B, N, D] -> z and the saved activations. `alone`: no other call runs meanwhile.
  ForwardHalf vjp(std::int64_t block, const Floats& patches, const Labels& labels, bool alone) const;

 private:
  using Named = std::vector<std::pair<std::string, const Floats*>>;

  int threads_of(bool alone) const;
  std::map<std::string, Floats> run(std::int64_t block, const char* kind, const Named& arrays,
                                    const Labels& labels) const;
  std::shared_ptr<Session> session(std::int64_t block, const char* kind, int threads) const;
  std::shared_ptr<const EmbeddingTables> tables(std::int64_t block) const;

  Bundle bundle_;
  int threads_;
  Logger logger_;
  std::int64_t block_bytes_ = 1, workers_ = 1;
  bool wide_ = false;
  int operator_threads_ = 1;
  mutable CachePool caches_;
  mutable std::mutex mutex_;  // of what follows
  mutable std::list<std::pair<std::string, std::shared_ptr<Session>>> sessions_;  // the one used last stands last
  mutable std::map<std::int64_t, std::shared_ptr<const EmbeddingTables>> tables_;
};

}  // namespace tarflow::detail

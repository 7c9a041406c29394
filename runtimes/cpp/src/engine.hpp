// Engine: what runs the blocks of one bundle. Nothing above it asks which one it is.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "log.hpp"
#include "worker_pool.hpp"

namespace tarflow::detail {

using Floats = std::vector<float>;
using Labels = std::vector<std::int64_t>;

/// One block's turn in a run of a batch.
struct Turn {
  std::int64_t block = 0;
  const Labels& labels;               // [G, B], empty without classes
  const Floats& guidance;             // [2, N]: g for a and for b, at each step
  const Floats& inverse_temperature;  // [G]
  OnStep on_step;                     // or empty; called in this thread, what it throws ends the run
  Call& call;

  std::int64_t branches() const { return static_cast<std::int64_t>(inverse_temperature.size()); }
};

/// The derivative of something with respect to z, given the z [., N, D] of some images; called from any thread.
using Cotangent = std::function<Floats(Floats z)>;

/// Every method may be called from several threads at once. Patches are [B, N, D] in the order of the data; labels [B],
/// the null class as `classes`, and empty on models without classes. Throws Error (TARFLOW_ERROR_ENGINE).
class Engine {
 public:
  /// `threads` is how many processors to use; 0 is all that this process may use.
  Engine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger);
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Bundle& bundle() const { return *bundle_; }
  const Config& config() const { return bundle_->config; }
  const Logger& logger() const { return logger_; }
  int threads() const { return threads_; }
  /// B of patches [B, N, D].
  std::int64_t batch_of(const Floats& patches) const;

  virtual const char* name() const = 0;
  /// The instruction set that it computes with, or "" where that is not its own affair.
  virtual const char* kernel() const { return ""; }
  /// z [B, N, D] -> x [B, N, D] of one block, one patch after the other, in place.
  virtual void invert(const Turn& turn, Floats& patches) const = 0;
  /// Patches -> z; log|det| [B], nats, is added to `log_det`.
  virtual Floats forward(std::int64_t block, const Floats& patches, const Labels& labels, const Call& call,
                         std::vector<double>& log_det) const = 0;
  /// The derivative of (c . z + log|det|) of all blocks with respect to the patches, with c = `cotangent`(z).
  virtual Floats vjp(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
                     const Call& call) const = 0;
  /// Load what `vjp` needs, ahead of long work that ends with it.
  virtual void prepare_vjp() const {}

 protected:
  const std::shared_ptr<const Bundle>& shared_bundle() const { return bundle_; }

 private:
  std::shared_ptr<const Bundle> bundle_;
  int threads_;
  Logger logger_;
};

struct EngineOptions {
  std::string name;         // empty or auto: native where it reads the bundle's precision, else ort-cpu
  int threads = 0;          // as of Engine
  std::string ort_library;  // as of load_ort
};

/// The engine of that name, or Error (TARFLOW_ERROR_ENGINE): never another one.
std::shared_ptr<const Engine> open_engine(Bundle bundle, const EngineOptions& options, Logger logger);

}  // namespace tarflow::detail

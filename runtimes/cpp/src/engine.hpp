// Engine: ONNX Runtime over the blocks of one bundle. Sessions are opened when first needed and share one arena.
//
// A batch is cut over single-threaded runs in threads of this process rather than over threads inside each operator:
// the parts then never wait for each other, and what a part keeps in its caches stays near one core.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "cache_pool.hpp"
#include "crew.hpp"
#include "log.hpp"
#include "rewrites/rewrites.hpp"
#include "session.hpp"
#include "steppers.hpp"

namespace tarflow::detail {

/// A part of a batch: images start .. stop - 1.
struct Part {
  std::int64_t start, stop;
  std::int64_t count() const { return stop - start; }
};

/// z of a block for some images, and what the way back needs.
struct ForwardHalf {
  Floats z;
  Shape shape;  // [B, N, D]
  std::map<std::string, Ort::Value> saved;
  std::shared_ptr<Session> backward;
  std::function<Floats(const Floats&)> whole;  // in place of the two where the gradient graph cannot be cut

  /// The gradient of these images for a cotangent [B, N, D], once; frees what was kept.
  Floats way_back(const Floats& cotangent);
};

/// Every method may be called from several threads at once. Labels are [B], the null class as `classes`, and empty on
/// models without classes. Throws Error (TARFLOW_ERROR_ENGINE) when a graph cannot be opened or run.
class Engine {
 public:
  struct Settings {
    int threads = 0;        // processors to use; 0 is all that this process may use
    Provider provider;
    Logger logger;
    bool portable = false;  // leave the rewrites out
  };

  Engine(Bundle bundle, Settings settings);
  const Bundle& bundle() const { return bundle_; }
  const Config& config() const { return bundle_.config; }
  const Logger& logger() const { return settings_.logger; }
  const std::string& name() const { return settings_.provider.name; }
  const char* weights() const { return bundle_.half ? "float16" : "float32"; }
  int threads() const { return settings_.threads; }
  /// The processor and how many of it, as tuned plans name the machine.
  const std::string& device() const { return device_; }
  /// Graphs that run as they are because a rewrite declined.
  std::int64_t declined() const;
  /// Parts of a batch that run faster side by side, each in a thread of its own; 1 where they do not.
  std::int64_t workers() const { return workers_; }

  /// B of patches [B, N, D].
  std::int64_t batch_of(const Floats& patches) const;
  /// How to cut a batch for `stepper`.
  std::vector<Part> parts(std::int64_t images, std::int64_t branches) const;
  /// Patches [B, N, D] -> z [B, N, D]; log|det| [B], nats, is added to `log_det`.
  Floats forward(std::int64_t block, const Floats& patches, const Labels& labels, std::vector<double>& log_det) const;
  /// Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D].
  Floats gradient(std::int64_t block, const Floats& patches, const Floats& cotangent, const Labels& labels) const;
  /// Images that `vjp` may take so that what it keeps of all blocks fits; 0 where `gradient` is to be used.
  std::int64_t vjp_images() const;
  /// Patches [B, N, D] -> z and the way back. `alone`: no other call runs meanwhile.
  ForwardHalf vjp(std::int64_t block, const Floats& patches, const Labels& labels, bool alone) const;
  /// Start an inverse. `alone`: no other part runs meanwhile, so that this one may have all threads.
  std::unique_ptr<Stepper> stepper(std::int64_t block, const StepInputs& inputs, bool alone) const;
  /// Start an inverse by windows of one image, whose noise is in block order.
  std::unique_ptr<Windows> windows(std::int64_t block, const StepInputs& inputs, bool alone) const;

 private:
  struct Rewritten {
    std::shared_ptr<Session> session;
    std::shared_ptr<const SequentialTables> tables;
  };
  using Named = std::vector<std::pair<std::string, const Floats*>>;

  const Block& files(std::int64_t block) const { return bundle_.blocks[static_cast<std::size_t>(block)]; }
  int threads_of(bool alone) const;
  SessionSettings session_settings(int threads, bool spinning) const;
  onnx::Model parse(std::int64_t block, const std::string& path) const;
  std::vector<Floats> run(std::int64_t block, const char* kind, const Named& arrays, const Labels& labels,
                          const std::vector<std::string>& outputs) const;
  std::shared_ptr<Session> open(std::int64_t block, const char* kind, int threads) const;
  /// The session of the rewritten step graph and its tables; empty where the rewrites or ONNX Runtime declined.
  Rewritten open_rewritten(std::int64_t block, const StepInputs& inputs, bool windows, int threads) const;
  /// The sessions of both halves of the gradient graph; empty where it is not of the form that can be cut.
  std::pair<std::shared_ptr<Session>, std::shared_ptr<Session>> open_halves(std::int64_t block, int threads) const;
  std::shared_ptr<Session> open_sequential(std::int64_t block, const StepKind& kind, int threads) const;
  template <typename Make>
  std::shared_ptr<Session> cached(const std::string& key, Make make) const;

  Bundle bundle_;
  Settings settings_;
  std::string device_;
  std::int64_t block_bytes_ = 1, workers_ = 1;
  bool wide_ = false;
  int operator_threads_ = 1;
  mutable CachePool caches_;
  mutable std::recursive_mutex mutex_;  // of what follows
  mutable std::list<std::pair<std::string, std::shared_ptr<Session>>> sessions_;  // the one used last stands last
  mutable std::map<std::int64_t, std::shared_ptr<const SequentialTables>> tables_;
  mutable std::map<std::string, std::string> declined_;  // reasons
};

}  // namespace tarflow::detail

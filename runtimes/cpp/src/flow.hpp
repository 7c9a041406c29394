// Model: the bundle and its sessions, shared by threads. Sampler: the loops over blocks and patches, one per thread.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "bundle.hpp"
#include "ort.hpp"

namespace tarflow::detail {

enum class Graph { forward, step, gradient };

class Model {
 public:
  Model(Bundle bundle, int threads);
  const Bundle& bundle() const { return bundle_; }
  const Config& config() const { return bundle_.config; }
  /// The session of a block's graph, opened when first asked for; running it is thread-safe.
  Ort::Session& session(std::int64_t block, Graph graph) const;

 private:
  Bundle bundle_;
  int threads_;
  mutable std::mutex mutex_;
  mutable std::vector<std::array<std::unique_ptr<Ort::Session>, 3>> sessions_;
};

struct Guidance {
  double weight = 0.0;
  double temperature = 1.0;
  bool guide_a = true;
  bool guide_b = true;
  bool anneal = false;
  std::int64_t branches() const { return weight > 0.0 ? 2 : 1; }
};

using Floats = std::vector<float>;
using Labels = std::vector<std::int64_t>;          // [B], the null class as `classes`; empty without classes
using OnStep = std::function<void(std::int64_t block)>;  // after each step; an exception ends the run

/// All arrays hold B images as patches [B, N, D] in image order.
class Sampler {
 public:
  explicit Sampler(std::shared_ptr<const Model> model) : model_(std::move(model)) {}
  const Model& model() const { return *model_; }

  Floats decode(Floats latents, const Labels& labels, const Guidance& guidance, const OnStep& on_step) const;
  /// Latents u, with log|det du/dx| [B] in nats added up; `inputs` collects the input of each block when given.
  Floats encode(Floats patches, const Labels& labels, std::vector<double>& log_det,
                std::vector<Floats>* inputs = nullptr) const;
  /// The gradient of log q with respect to the patches.
  Floats score(const Floats& patches, const Labels& labels) const;
  /// Images that one call of a forward or gradient graph may take.
  std::int64_t images_per_run() const;

 private:
  Floats inverse_block(std::int64_t block, const Floats& z, const Labels& labels, const Guidance& guidance,
                       const OnStep& on_step) const;
  std::shared_ptr<const Model> model_;
};

std::vector<double> log_prob_of(const Floats& u, const std::vector<double>& log_det);

/// Images [B, C, height, width] -> patches [B, N, D], each patch flattened channel first; and back.
Floats patchify(const float* images, std::int64_t batch, const Config& config);
void unpatchify(const Floats& patches, std::int64_t batch, const Config& config, float* images);

}  // namespace tarflow::detail

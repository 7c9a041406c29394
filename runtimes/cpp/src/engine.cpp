// The measurements behind the limits here are in tarflow_runtimes/engines/ort_cpu/engine.py; they are the same numbers, so
// that both runtimes cut a batch at the same places and draw the same bits.
#include "engine.hpp"

#include <algorithm>

#include "cpus.hpp"
#include "worker_pool.hpp"

namespace tarflow::detail {
namespace {

constexpr std::int64_t kRowsPerPart = 16;                        // cache rows of one part
constexpr std::int64_t kLeastRowsPerPart = 6;                    // below, a second thread costs more than it brings
constexpr std::int64_t kPartCacheBytes = 16 << 20;               // attention caches of a part, near one core
constexpr std::int64_t kOperatorThreadsBytes = 16 << 20;         // weights of a block: threads inside the operators
constexpr std::int64_t kAloneThreadsBytes = 4 << 20;             // the same for a part that runs alone
constexpr std::int64_t kCacheBytes = std::int64_t{1} << 30;      // attention caches of one part at most
constexpr std::int64_t kActivationBytes = 128 << 20;             // of one run of a forward or gradient graph
constexpr std::int64_t kVjpBytes = 256 << 20;                    // activations kept for backward passes
constexpr std::int64_t kSessionsBytes = std::int64_t{3} << 30;   // weights of the open sessions

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

/// The session has checked that the value is float32.
void append(Floats& values, const Ort::Value& value) {
  const float* added = value.GetTensorData<float>();
  values.insert(values.end(), added, added + value.GetTensorTypeAndShapeInfo().GetElementCount());
}

}  // namespace

std::vector<Part> cut(std::int64_t images, std::int64_t count) {
  std::vector<Part> parts;
  for (std::int64_t i = 0; i < count; ++i) parts.push_back({images * i / count, images * (i + 1) / count});
  return parts;
}

Engine::Engine(Bundle bundle, int threads, Logger logger)
    : bundle_(std::move(bundle)), threads_(threads != 0 ? threads : usable_cpus()), logger_(logger) {
  for (const Block& block : bundle_.blocks) block_bytes_ = std::max(block_bytes_, block.bytes);
  wide_ = block_bytes_ >= kOperatorThreadsBytes;
  workers_ = wide_ ? 1 : threads_;
  operator_threads_ = wide_ ? threads_ : 1;
}

std::int64_t Engine::batch_of(const Floats& patches) const {
  return static_cast<std::int64_t>(patches.size()) / config().dims();
}

/// Equal parts: at most about kRowsPerPart rows each where parts run side by side, else what memory allows.
std::vector<Part> Engine::parts(std::int64_t images, std::int64_t branches) const {
  const Config& c = config();
  const std::int64_t rows = images * branches;
  const std::int64_t row_bytes = 8 * c.layers * c.patches * c.width;
  std::int64_t count = divided_up(images, std::max<std::int64_t>(1, kCacheBytes / (branches * row_bytes)));
  if (!wide_) {
    const std::int64_t limit = std::min(kRowsPerPart, std::max(kLeastRowsPerPart, kPartCacheBytes / row_bytes));
    const std::int64_t rounds = divided_up(rows, limit * workers_);
    count = std::max(count, std::min({rounds * workers_, rows / kLeastRowsPerPart, images}));
  }
  return cut(images, count);
}

std::unique_ptr<Stepper> Engine::stepper(std::int64_t block, const StepInputs& inputs, bool alone) const {
  return std::make_unique<Stepper>(session(block, inputs.graph(), threads_of(alone)), config(), inputs, tables(block),
                                   caches_);
}

Floats Engine::forward(std::int64_t block, const Floats& patches, const Labels& labels,
                       std::vector<double>& log_det) const {
  std::map<std::string, Floats> results = run(block, "forward", {{"patches", &patches}}, labels);
  const Floats& added = results.at("log_det");
  for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += static_cast<double>(added[i]);
  return std::move(results.at("z"));
}

Floats Engine::gradient(std::int64_t block, const Floats& patches, const Floats& cotangent,
                        const Labels& labels) const {
  return run(block, "gradient", {{"patches", &patches}, {"cotangent", &cotangent}}, labels).at("gradient");
}

std::int64_t Engine::vjp_images() const {
  const Config& c = config();
  const std::int64_t layer_bytes = 4 * c.patches * (c.heads() * c.patches + 9 * c.width);
  return kVjpBytes / (workers_ * c.blocks * c.layers * layer_bytes);
}

ForwardHalf Engine::vjp(std::int64_t block, const Floats& patches, const Labels& labels, bool alone) const {
  const std::shared_ptr<Session> ahead = session(block, "vjp_forward", threads_of(alone));
  ForwardHalf half;
  half.backward = session(block, "vjp_backward", threads_of(alone));
  const std::int64_t batch = batch_of(patches);
  half.shape = {batch, config().patches, config().patch_values};
  const Ort::Value x = borrowed(patches.data(), half.shape);
  const Ort::Value y = labels.empty() ? Ort::Value{nullptr} : borrowed(labels.data(), {batch});
  half.kept = ahead->run({{"patches", x}, {"labels", y}}, batch);
  append(half.z, half.kept.at("z"));
  return half;
}

Floats ForwardHalf::way_back(const Floats& cotangent) {
  const Ort::Value upstream = borrowed(cotangent.data(), shape);
  std::map<std::string, const OrtValue*> given = {{"cotangent", upstream}};
  for (const auto& [name, value] : kept) given.emplace(name, value);
  Floats gradient;
  append(gradient, backward->run(given, shape[0]).at("gradient"));
  kept.clear();
  return gradient;
}

int Engine::threads_of(bool alone) const {
  return alone && block_bytes_ >= kAloneThreadsBytes ? threads_ : operator_threads_;
}

/// A forward or gradient graph on a whole batch: a few images at a time, side by side where that is faster. The
/// activations of all runs together stay within kActivationBytes, or are those of one image each.
std::map<std::string, Floats> Engine::run(std::int64_t block, const char* kind, const Named& arrays,
                                          const Labels& labels) const {
  const Config& c = config();
  const std::int64_t batch = batch_of(*arrays[0].second);
  const std::int64_t image_bytes = 4 * c.patches * (4 * c.heads() * c.patches + 20 * c.width);
  const std::int64_t size = std::max<std::int64_t>(
      1, std::min(kActivationBytes / (image_bytes * workers_), divided_up(batch, workers_)));
  const std::int64_t pieces = divided_up(batch, size);
  const std::shared_ptr<Session> opened = session(block, kind, threads_of(pieces == 1));
  std::vector<std::map<std::string, Ort::Value>> made(static_cast<std::size_t>(pieces));
  const auto run_piece = [&](std::int64_t piece) {
    const std::int64_t start = piece * size, count = std::min(size, batch - start);
    std::map<std::string, Ort::Value> values;
    for (const auto& [name, array] : arrays)
      values.emplace(name, borrowed(array->data() + start * c.dims(), {count, c.patches, c.patch_values}));
    if (!labels.empty()) values.emplace("labels", borrowed(labels.data() + start, {count}));
    std::map<std::string, const OrtValue*> given;
    for (const auto& [name, value] : values) given.emplace(name, value);
    made[static_cast<std::size_t>(piece)] = opened->run(given, count);
  };
  WorkerPool(pieces, nullptr).run(run_piece, std::min(workers_, pieces));
  std::map<std::string, Floats> results;
  for (const std::map<std::string, Ort::Value>& values : made) {
    for (const auto& [name, value] : values) append(results[name], value);
  }
  return results;
}

/// The session of a graph on a block's weights, opened when it is not there; the one used longest ago goes when many
/// are.
std::shared_ptr<Session> Engine::session(std::int64_t block, const char* kind, int threads) const {
  const std::string key = std::to_string(block) + "/" + kind + " " + std::to_string(threads);
  const std::lock_guard<std::mutex> lock(mutex_);
  auto place = std::find_if(sessions_.begin(), sessions_.end(), [&](const auto& one) { return one.first == key; });
  if (place == sessions_.end()) {
    logger_(TARFLOW_LOG_INFO, "opening the graph of block " + key);
    const bool spinning = std::string(kind).compare(0, 4, "step") == 0;
    auto opened = std::make_shared<Session>(bundle_.graphs.at(kind),
                                            bundle_.blocks[static_cast<std::size_t>(block)].folder,
                                            Session::Settings{threads, spinning, &logger_});
    place = sessions_.emplace(sessions_.end(), key, std::move(opened));
  }
  sessions_.splice(sessions_.end(), sessions_, place);
  const std::int64_t most = std::max<std::int64_t>(1, kSessionsBytes / block_bytes_);
  while (static_cast<std::int64_t>(sessions_.size()) > most) sessions_.pop_front();
  return sessions_.back().second;
}

std::shared_ptr<const EmbeddingTables> Engine::tables(std::int64_t block) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<const EmbeddingTables>& kept = tables_[block];
  if (kept) return kept;
  const Block& files = bundle_.blocks[static_cast<std::size_t>(block)];
  auto made = std::make_shared<EmbeddingTables>();
  const Floats rows = bundle_.floats(files, "pos_embed");
  for (std::int64_t i = 0; i < config().patches; ++i) {
    const auto row = rows.begin() + (files.reversed ? config().patches - 1 - i : i) * config().width;
    made->pos_embed.insert(made->pos_embed.end(), row, row + config().width);
  }
  if (config().classes != 0) made->class_embed = bundle_.floats(files, "class_embed");
  return kept = std::move(made);
}

}  // namespace tarflow::detail

// The measurements behind the limits here are in tarflow_runtimes/_engines/ort_cpu.py; they are the same numbers, so
// that both runtimes cut a batch at the same places and draw the same bits.
#include "engine.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <tuple>

#include "cpus.hpp"
#include "error.hpp"

namespace tarflow::detail {
namespace {

constexpr std::int64_t kRowsPerPart = 16;                        // cache rows of one part
constexpr std::int64_t kLeastRowsPerPart = 6;                    // below, a second thread costs more than it brings
constexpr std::int64_t kPartCacheBytes = 16 << 20;               // attention caches of a part, near one core
constexpr std::int64_t kOperatorThreadsBytes = 16 << 20;         // weights of a block: threads inside the operators
constexpr std::int64_t kAloneThreadsBytes = 4 << 20;             // the same for a part that runs alone
constexpr std::int64_t kCacheBytes = std::int64_t{1} << 30;      // attention caches of one part at most
constexpr std::int64_t kActivationBytes = 128 << 20;             // of one run of a forward or gradient graph
constexpr std::int64_t kVjpBytes = 256 << 20;                    // what the ways back of all blocks may keep
constexpr std::int64_t kSessionsBytes = std::int64_t{3} << 30;   // weights of the open sessions

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) throw engine_error("cannot read " + path);
  return bytes;
}

void append(Floats& values, const Ort::Value& value) {
  const float* added = value.GetTensorData<float>();
  values.insert(values.end(), added, added + value.GetTensorTypeAndShapeInfo().GetElementCount());
}

}  // namespace

Engine::Engine(Bundle bundle, Settings settings) : bundle_(std::move(bundle)), settings_(std::move(settings)) {
  if (settings_.threads == 0) settings_.threads = usable_cpus();
  device_ = cpu_name() + ", " + std::to_string(settings_.threads) + " CPUs";
  for (const Block& block : bundle_.blocks) {
    struct stat status = {};
    if (stat(block.weights.c_str(), &status) == 0) block_bytes_ = std::max<std::int64_t>(block_bytes_, status.st_size);
  }
  settings_.portable = settings_.portable || !settings_.provider.on_cpu();
  wide_ = block_bytes_ >= kOperatorThreadsBytes || !settings_.provider.on_cpu();
  workers_ = wide_ ? 1 : settings_.threads;
  operator_threads_ = wide_ ? settings_.threads : 1;
}

std::int64_t Engine::batch_of(const Floats& patches) const {
  return static_cast<std::int64_t>(patches.size()) / config().dims();
}

std::int64_t Engine::declined() const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  return static_cast<std::int64_t>(declined_.size());
}

/// Equal parts: at most about kRowsPerPart rows each where parts run side by side, else what memory allows.
std::vector<Part> Engine::parts(std::int64_t images, std::int64_t branches) const {
  const Config& c = config();
  const std::int64_t rows = images * branches;
  const std::int64_t row_bytes = 8 * c.layers * c.patches() * c.width;
  std::int64_t count = divided_up(images, std::max<std::int64_t>(1, kCacheBytes / (branches * row_bytes)));
  if (!wide_) {
    const std::int64_t limit = std::min(kRowsPerPart, std::max(kLeastRowsPerPart, kPartCacheBytes / row_bytes));
    const std::int64_t rounds = divided_up(rows, limit * workers_);
    count = std::max(count, std::min({rounds * workers_, rows / kLeastRowsPerPart, images}));
  }
  std::vector<Part> made;
  for (std::int64_t i = 0; i < count; ++i) made.push_back({images * i / count, images * (i + 1) / count});
  return made;
}

Floats Engine::forward(std::int64_t block, const Floats& patches, const Labels& labels,
                       std::vector<double>& log_det) const {
  std::vector<Floats> results = run(block, "forward", {{"patches", &patches}}, labels, {"z", "log_det"});
  for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += static_cast<double>(results[1][i]);
  return std::move(results[0]);
}

Floats Engine::gradient(std::int64_t block, const Floats& patches, const Floats& cotangent,
                        const Labels& labels) const {
  return run(block, "gradient", {{"patches", &patches}, {"cotangent", &cotangent}}, labels,
             {"gradient"})[0];
}

std::int64_t Engine::vjp_images() const {
  const Config& c = config();
  if (bundle_.half || !c.nvp || settings_.portable) return 0;  // the cut needs one dtype throughout, and the scale
  const std::int64_t layer_bytes = 4 * c.patches() * (c.heads() * c.patches() + 9 * c.width);
  return kVjpBytes / (workers_ * c.blocks * c.layers * layer_bytes);
}

ForwardHalf Engine::vjp(std::int64_t block, const Floats& patches, const Labels& labels, bool alone) const {
  ForwardHalf half;
  std::shared_ptr<Session> ahead;
  std::tie(ahead, half.backward) = open_halves(block, threads_of(alone));
  if (!ahead) {
    std::vector<double> unused;
    half.z = forward(block, patches, labels, unused);
    half.whole = [this, block, patches, labels](const Floats& cotangent) {
      return gradient(block, patches, cotangent, labels);
    };
    return half;
  }
  const std::int64_t batch = batch_of(patches);
  half.shape = {batch, config().patches(), config().patch_values()};
  const Ort::Value x = borrowed(patches.data(), half.shape);
  const Ort::Value y = labels.empty() ? Ort::Value{nullptr} : borrowed(labels.data(), {batch});
  std::vector<const OrtValue*> given;
  for (const std::string& name : ahead->inputs()) given.push_back(name == "labels" ? y : x);
  std::vector<Ort::Value> values = ahead->run(given, ahead->outputs());
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (ahead->outputs()[i] == "z")
      append(half.z, values[i]);
    else
      half.saved.emplace(ahead->outputs()[i], std::move(values[i]));
  }
  return half;
}

std::pair<std::shared_ptr<Session>, std::shared_ptr<Session>> Engine::open_halves(std::int64_t block,
                                                                                  int threads) const {
  const std::string& path = files(block).gradient;
  const std::string folder = path.substr(0, path.rfind('/'));
  const std::string declined = std::to_string(block) + "/vjp", key = declined + ' ' + std::to_string(threads);
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (declined_.count(declined) != 0) return {};
  std::unique_ptr<SplitGradient> halves;
  const auto opened = [&](std::string SplitGradient::* one) {
    if (!halves) halves = std::make_unique<SplitGradient>(split_gradient(parse(block, path)));
    return Session::of_bytes((*halves).*one, folder, session_settings(threads, false));
  };
  try {
    auto ahead = cached(key + " forward", [&] { return opened(&SplitGradient::forward); });
    return {ahead, cached(key + " backward", [&] { return opened(&SplitGradient::backward); })};
  } catch (const PatternMismatch& mismatch) {
    declined_[declined] = mismatch.what();
  }
  logger()(TARFLOW_LOG_WARNING, "block " + std::to_string(block) + " runs its portable gradient graph: " +
                                    declined_[declined]);
  return {};
}

Floats ForwardHalf::way_back(const Floats& cotangent) {
  if (whole) return whole(cotangent);
  const Ort::Value upstream = borrowed(cotangent.data(), shape);
  std::vector<const OrtValue*> given;
  for (const std::string& name : backward->inputs()) {
    const auto kept = saved.find(name);
    given.push_back(kept == saved.end() ? upstream : kept->second);
  }
  Floats gradient;
  append(gradient, backward->run(given, {"gradient"})[0]);
  saved.clear();
  return gradient;
}

std::unique_ptr<Stepper> Engine::stepper(std::int64_t block, const StepInputs& inputs, bool alone) const {
  Rewritten opened = open_rewritten(block, inputs, false, threads_of(alone));
  if (!opened.session) return portable_stepper(open(block, "step", operator_threads_), config(), inputs);
  return sequential_stepper(std::move(opened.session), config(), inputs, std::move(opened.tables), caches_);
}

std::unique_ptr<Windows> Engine::windows(std::int64_t block, const StepInputs& inputs, bool alone) const {
  Rewritten opened = open_rewritten(block, inputs, true, threads_of(alone));
  if (!opened.session) return portable_windows(open(block, "step", operator_threads_), config(), inputs);
  return rewritten_windows(std::move(opened.session), config(), inputs, std::move(opened.tables));
}

int Engine::threads_of(bool alone) const {
  return alone && block_bytes_ >= kAloneThreadsBytes ? settings_.threads : operator_threads_;
}

SessionSettings Engine::session_settings(int threads, bool spinning) const {
  return {threads, spinning, settings_.provider, &settings_.logger};
}

onnx::Model Engine::parse(std::int64_t block, const std::string& path) const {
  onnx::Model model = onnx::parse_model(contents(path), path);
  const std::string& weights = files(block).weights;
  onnx::check_external_data(model, weights.substr(weights.rfind('/') + 1), path);
  return model;
}

/// A forward or gradient graph on a whole batch: a few images at a time, side by side where that is faster. The
/// activations of all runs together stay within kActivationBytes, or are those of one image each.
std::vector<Floats> Engine::run(std::int64_t block, const char* kind, const Named& arrays, const Labels& labels,
                                const std::vector<std::string>& outputs) const {
  const Config& c = config();
  const std::int64_t batch = batch_of(*arrays[0].second);
  const std::int64_t image_bytes = 4 * c.patches() * (4 * c.heads() * c.patches() + 20 * c.width);
  const std::int64_t size = std::max<std::int64_t>(
      1, std::min(kActivationBytes / (image_bytes * workers_), divided_up(batch, workers_)));
  const std::int64_t pieces = divided_up(batch, size);
  const std::shared_ptr<Session> session = open(block, kind, threads_of(pieces == 1));
  std::vector<std::vector<Ort::Value>> made(static_cast<std::size_t>(pieces));
  const auto run_piece = [&](std::int64_t piece) {
    const std::int64_t start = piece * size, count = std::min(size, batch - start);
    std::vector<Ort::Value> values;
    std::vector<const OrtValue*> given;
    for (const std::string& name : session->inputs()) {
      if (name == "labels") values.push_back(borrowed(labels.data() + start, {count}));
      for (const auto& [given_name, array] : arrays) {
        if (name == given_name)
          values.push_back(borrowed(array->data() + start * c.dims(), {count, c.patches(), c.patch_values()}));
      }
    }
    for (const Ort::Value& value : values) given.push_back(value);
    made[static_cast<std::size_t>(piece)] = session->run(given, outputs);
  };
  Crew(pieces, nullptr).work(run_piece, std::min(workers_, pieces));
  std::vector<Floats> results(outputs.size());
  for (const std::vector<Ort::Value>& values : made) {
    for (std::size_t i = 0; i < values.size(); ++i) append(results[i], values[i]);
  }
  return results;
}

std::shared_ptr<Session> Engine::open(std::int64_t block, const char* kind, int threads) const {
  const Block& named = files(block);
  const std::string what = kind;
  const std::string& path = what == "forward" ? named.forward : what == "step" ? named.step : named.gradient;
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  return cached(std::to_string(block) + "/" + what + " " + std::to_string(threads), [&] {
    parse(block, path);  // which file it names for its weights is checked
    return Session::of_file(path, session_settings(threads, what == "step"));
  });
}

Engine::Rewritten Engine::open_rewritten(std::int64_t block, const StepInputs& inputs, bool windows,
                                         int threads) const {
  if (settings_.portable) return {};
  const StepKind kind{inputs.branches(), inputs.temperature(), windows};
  const std::string key = std::to_string(block) + "/rewritten " + std::to_string(kind.branches) +
                          (kind.temperature ? " temperature" : "") + (windows ? " windows" : "");
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (declined_.count(key) != 0) return {};
  std::string reason;
  try {
    Rewritten made;
    made.session = cached(key + " " + std::to_string(threads), [&] { return open_sequential(block, kind, threads); });
    made.tables = tables_.at(block);
    return made;
  } catch (const PatternMismatch& mismatch) {
    reason = mismatch.what();
  } catch (const Error& error) {
    if (error.status != TARFLOW_ERROR_ENGINE) throw;
    reason = error.what();
  }
  declined_[key] = reason;
  logger()(TARFLOW_LOG_WARNING, "block " + std::to_string(block) + " runs its portable step graph: " + reason);
  return {};
}

/// The session of the rewritten step graph of a block; its tables are read on the way.
std::shared_ptr<Session> Engine::open_sequential(std::int64_t block, const StepKind& kind, int threads) const {
  const Block& named = files(block);
  const Config& c = config();
  const SequentialGraph graph = sequential_graph(parse(block, named.step), c, kind);
  if (tables_.count(block) == 0) {
    auto tables = std::make_shared<SequentialTables>();
    const Floats rows = onnx::external_floats(graph.tables.pos_embed, named.weights);
    for (std::int64_t i = 0; i < c.patches(); ++i) {
      const std::int64_t from = named.reversed ? c.patches() - 1 - i : i;
      tables->pos_embed.insert(tables->pos_embed.end(), rows.begin() + from * c.width,
                               rows.begin() + (from + 1) * c.width);
    }
    if (c.classes != 0) tables->class_embed = onnx::external_floats(graph.tables.class_embed, named.weights);
    tables_[block] = std::move(tables);
  }
  return Session::of_bytes(graph.model, named.step.substr(0, named.step.rfind('/')), session_settings(threads, true));
}

/// The session under that key, opened when it is not there; the one used longest ago goes when many are.
template <typename Make>
std::shared_ptr<Session> Engine::cached(const std::string& key, Make make) const {
  auto place = std::find_if(sessions_.begin(), sessions_.end(), [&](const auto& one) { return one.first == key; });
  if (place == sessions_.end()) {
    logger()(TARFLOW_LOG_INFO, "opening the graph of block " + key);
    place = sessions_.emplace(sessions_.end(), key, make());
  }
  sessions_.splice(sessions_.end(), sessions_, place);
  const std::int64_t most = std::max<std::int64_t>(1, kSessionsBytes / block_bytes_);
  while (static_cast<std::int64_t>(sessions_.size()) > most) sessions_.pop_front();
  return sessions_.back().second;
}

}  // namespace tarflow::detail

// The measurements behind the limits here are in tarflow_runtimes/engines/ort_cpu/engine.py; they are the same numbers,
// so that both runtimes cut a batch at the same places and draw the same bits.
#include "ort_cpu.hpp"

#include <algorithm>

#include "error.hpp"
#include "ort.hpp"
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

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

/// The session has checked that the value is float32.
void append(Floats& values, const Ort::Value& value) {
  const float* added = value.GetTensorData<float>();
  values.insert(values.end(), added, added + value.GetTensorTypeAndShapeInfo().GetElementCount());
}

/// The images in order, in parts of equal size to within one: as few as have at most `most` images each, but at least
/// `least` parts as far as there are images. The rule of `decode/batches.py`.
std::vector<Part> cut(std::int64_t images, std::int64_t most, std::int64_t least) {
  const std::int64_t count = std::min(images, std::max(least, divided_up(images, most)));
  std::vector<Part> parts;
  for (std::int64_t i = 0; i < count; ++i) parts.push_back({images * i / count, images * (i + 1) / count});
  return parts;
}

std::int64_t largest_block(const Bundle& bundle) {
  std::int64_t bytes = 1;
  for (const Block& block : bundle.blocks) bytes = std::max(bytes, block.bytes);
  return bytes;
}

/// The labels of one part of the batch, of both branches.
Labels part_of(const Labels& labels, std::int64_t batch, const Part& part) {
  Labels chosen;
  for (std::int64_t row = 0; row < static_cast<std::int64_t>(labels.size()); row += batch)
    chosen.insert(chosen.end(), labels.begin() + row + part.start, labels.begin() + row + part.stop);
  return chosen;
}

}  // namespace

OrtCpuEngine::OrtCpuEngine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger,
                           const std::string& library, const char* user)
    : Engine(std::move(bundle), threads, logger), block_bytes_(largest_block(this->bundle())),
      workers_(block_bytes_ >= kOperatorThreadsBytes ? 1 : this->threads()),
      wide_(block_bytes_ >= kOperatorThreadsBytes), operator_threads_(wide_ ? this->threads() : 1),
      sessions_(kSessionsBytes / block_bytes_) {
  if (this->bundle().graphs.empty())
    throw engine_error("bundle " + this->bundle().name() + " is of " + this->bundle().precision +
                           " and has no graphs for ort-cpu",
                       "open the bundle that it was converted from, or tarflow convert that one to another precision");
  load_ort(library, user);
  logger(TARFLOW_LOG_INFO, std::string("ONNX Runtime ") + ort_version());
}

/// Equal parts: at most about kRowsPerPart rows each where parts run side by side, else what memory allows.
std::vector<Part> OrtCpuEngine::parts(std::int64_t images, std::int64_t branches) const {
  const Config& c = config();
  const std::int64_t rows = images * branches;
  const std::int64_t row_bytes = 8 * c.layers * c.patches * c.width;
  std::int64_t least = 1;
  if (!wide_) {
    const std::int64_t limit = std::min(kRowsPerPart, std::max(kLeastRowsPerPart, kPartCacheBytes / row_bytes));
    const std::int64_t rounds = divided_up(rows, limit * workers_);
    least = std::min(rounds * workers_, rows / kLeastRowsPerPart);
  }
  return cut(images, std::max<std::int64_t>(1, kCacheBytes / (branches * row_bytes)), least);
}

void OrtCpuEngine::invert(const Turn& turn, Floats& patches) const {
  const Config& c = config();
  const Floats z = std::move(patches);
  const std::int64_t batch = batch_of(z), steps = c.patches - 1;
  const std::vector<Part> cuts = parts(batch, turn.branches());
  patches.resize(z.size());
  WorkerPool pool(static_cast<std::int64_t>(cuts.size()), turn.on_step, &turn.call);
  const auto work = [&](std::int64_t index) {
    const Part& part = cuts[size(index)];
    StepInputs given;
    given.noise = z.data() + part.start * c.dims();
    given.batch = part.count();
    given.labels = part_of(turn.labels, batch, part);
    given.guidance = turn.guidance.data();
    given.inverse_temperature = turn.inverse_temperature;
    given.reversed = bundle().blocks[size(turn.block)].reversed;
    given.half_cache = bundle().cache_dtype() == "float16";
    Stepper stepper(session(turn.block, given.graph(), threads_of(cuts.size() == 1)), c, given, tables(turn.block),
                    caches_);
    for (std::int64_t done = 1; done <= steps; ++done) {
      stepper.advance();
      if (pool.stopped()) return;
      pool.report(index, done);
    }
    stepper.result(patches.data() + part.start * c.dims());
  };
  pool.run(work, std::min(workers_, static_cast<std::int64_t>(cuts.size())));
}

Floats OrtCpuEngine::forward(std::int64_t block, const Floats& patches, const Labels& labels, const Call& call,
                             std::vector<double>& log_det) const {
  std::map<std::string, Floats> results = run(block, "forward", {{"patches", &patches}}, labels, call);
  const Floats& added = results.at("log_det");
  for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += static_cast<double>(added[i]);
  return std::move(results.at("z"));
}

Floats OrtCpuEngine::vjp(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
                         const Call& call) const {
  const std::int64_t most = vjp_images();
  if (most == 0) return vjp_recomputed(patches, labels, cotangent, call);
  const std::int64_t batch = batch_of(patches), dims = config().dims();
  const std::vector<Part> pieces = cut(batch, most, workers_);
  const std::int64_t count = static_cast<std::int64_t>(pieces.size());
  Floats result(patches.size());
  const auto work = [&](std::int64_t number) {
    const auto [start, stop] = pieces[size(number)];
    Floats x(patches.begin() + start * dims, patches.begin() + stop * dims);
    const Labels y = labels.empty() ? Labels{} : Labels(labels.begin() + start, labels.begin() + stop);
    std::vector<ForwardHalf> halves;
    for (std::int64_t block = 0; block < config().blocks; ++block) {
      call.check();
      halves.push_back(forward_half(block, x, y, count == 1));
      x = std::move(halves.back().z);
    }
    Floats upstream = cotangent(std::move(x));
    for (; !halves.empty(); halves.pop_back()) {
      call.check();
      upstream = halves.back().backpropagate(upstream);
    }
    std::copy(upstream.begin(), upstream.end(), result.begin() + start * dims);
  };
  WorkerPool(count, nullptr, &call).run(work, std::min(workers_, count));
  return result;
}

/// `vjp` where nothing but the blocks' inputs can be kept: each gradient repeats its block's forward pass.
Floats OrtCpuEngine::vjp_recomputed(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
                                    const Call& call) const {
  std::vector<Floats> inputs;
  Floats x = patches;
  std::vector<double> unused;
  for (std::int64_t block = 0; block < config().blocks; ++block) {
    call.check();
    inputs.push_back(x);
    x = forward(block, x, labels, call, unused);
  }
  Floats upstream = cotangent(std::move(x));
  for (std::int64_t block = config().blocks - 1; block >= 0; --block) {
    call.check();
    const Named given = {{"patches", &inputs.back()}, {"cotangent", &upstream}};
    upstream = run(block, "gradient", given, labels, call).at("gradient");
    inputs.pop_back();
  }
  return upstream;
}

/// Images whose forward halves of all blocks may be kept together; 0 where not even one's fit.
std::int64_t OrtCpuEngine::vjp_images() const {
  const Config& c = config();
  const std::int64_t layer_bytes = 4 * c.patches * (c.heads() * c.patches + 9 * c.width);
  return kVjpBytes / (workers_ * c.blocks * c.layers * layer_bytes);
}

/// `alone`: no other call runs meanwhile, so that this one may have all threads.
ForwardHalf OrtCpuEngine::forward_half(std::int64_t block, const Floats& patches, const Labels& labels,
                                       bool alone) const {
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

Floats ForwardHalf::backpropagate(const Floats& cotangent) {
  const Ort::Value upstream = borrowed(cotangent.data(), shape);
  std::map<std::string, const OrtValue*> given = {{"cotangent", upstream}};
  for (const auto& [name, value] : kept) given.emplace(name, value);
  Floats gradient;
  append(gradient, backward->run(given, shape[0]).at("gradient"));
  kept.clear();
  return gradient;
}

int OrtCpuEngine::threads_of(bool alone) const {
  return alone && block_bytes_ >= kAloneThreadsBytes ? threads() : operator_threads_;
}

/// A forward or gradient graph on a whole batch: a few images at a time, side by side where that is faster. The
/// activations of all runs together stay within kActivationBytes, or are those of one image each.
std::map<std::string, Floats> OrtCpuEngine::run(std::int64_t block, const char* kind, const Named& arrays,
                                                const Labels& labels, const Call& call) const {
  const Config& c = config();
  const std::int64_t batch = batch_of(*arrays[0].second);
  const std::int64_t image_bytes = 4 * c.patches * (4 * c.heads() * c.patches + 20 * c.width);
  const std::vector<Part> parts =
      cut(batch, std::max<std::int64_t>(1, kActivationBytes / (image_bytes * workers_)), workers_);
  const auto pieces = static_cast<std::int64_t>(parts.size());
  const std::shared_ptr<Session> opened = session(block, kind, threads_of(pieces == 1));
  std::vector<std::map<std::string, Ort::Value>> made(static_cast<std::size_t>(pieces));
  const auto run_piece = [&](std::int64_t piece) {
    const auto [start, stop] = parts[size(piece)];
    const std::int64_t count = stop - start;
    std::map<std::string, Ort::Value> values;
    for (const auto& [name, array] : arrays)
      values.emplace(name, borrowed(array->data() + start * c.dims(), {count, c.patches, c.patch_values}));
    if (!labels.empty()) values.emplace("labels", borrowed(labels.data() + start, {count}));
    std::map<std::string, const OrtValue*> given;
    for (const auto& [name, value] : values) given.emplace(name, value);
    made[static_cast<std::size_t>(piece)] = opened->run(given, count);
  };
  WorkerPool(pieces, nullptr, &call).run(run_piece, std::min(workers_, pieces));
  std::map<std::string, Floats> results;
  for (const std::map<std::string, Ort::Value>& values : made) {
    for (const auto& [name, value] : values) append(results[name], value);
  }
  return results;
}

std::shared_ptr<Session> OrtCpuEngine::session(std::int64_t block, const char* kind, int threads) const {
  const std::string key = std::to_string(block) + "/" + kind + " " + std::to_string(threads);
  return sessions_.get(key, [&] {
    logger()(TARFLOW_LOG_INFO, "opening the graph of block " + key);
    const bool spinning = std::string(kind).compare(0, 4, "step") == 0;
    return std::make_shared<Session>(bundle().graphs.at(kind), bundle().blocks[size(block)].folder,
                                     Session::Settings{threads, spinning, &logger()});
  });
}

std::shared_ptr<const EmbeddingTables> OrtCpuEngine::tables(std::int64_t block) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<const EmbeddingTables>& kept = tables_[block];
  if (kept) return kept;
  const Block& files = bundle().blocks[size(block)];
  auto made = std::make_shared<EmbeddingTables>();
  const Floats rows = bundle().floats(files, "pos_embed");
  for (std::int64_t i = 0; i < config().patches; ++i) {
    const auto row = rows.begin() + (files.reversed ? config().patches - 1 - i : i) * config().width;
    made->pos_embed.insert(made->pos_embed.end(), row, row + config().width);
  }
  if (config().classes != 0) made->class_embed = bundle().floats(files, "class_embed");
  return kept = std::move(made);
}

}  // namespace tarflow::detail

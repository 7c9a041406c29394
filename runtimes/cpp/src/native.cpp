#include "native.hpp"

#include <algorithm>
#include <chrono>
#include <future>

#include "bundle_files.hpp"
#include "error.hpp"
#include "tarflow_native.h"

namespace tarflow::detail {
namespace {

constexpr std::int64_t kPackedBytes = std::int64_t{4} << 30;  // of packed blocks that are kept
constexpr std::chrono::milliseconds kLook{1};                 // between two looks at the progress of a call

tarflow_native_shape shape_of(const Config& c) {
  return {c.patches, c.patch_values, c.width, c.layers, c.head_dim, c.classes, c.nvp ? 1 : 0};
}

void check(std::int32_t status, const char* culprit = nullptr) {
  if (status == TARFLOW_NATIVE_OK) return;
  throw engine_error(std::string("the native kernel: ") + tarflow_native_message(status) +
                         (culprit != nullptr ? std::string(": ") + culprit : ""),
                     status == TARFLOW_NATIVE_BAD_TENSOR ? "export the checkpoint again" : "");
}

/// The patches of every image in the other order.
void reverse(Floats& patches, const Config& c) {
  for (auto image = patches.begin(); image != patches.end(); image += c.dims()) {
    for (std::int64_t i = 0; i < c.patches / 2; ++i)
      std::swap_ranges(image + i * c.patch_values, image + (i + 1) * c.patch_values,
                       image + (c.patches - 1 - i) * c.patch_values);
  }
}

/// The same values for every image of a batch.
Floats repeated(const Floats& values, std::int64_t batch) {
  Floats all;
  all.reserve(values.size() * static_cast<std::size_t>(batch));
  for (std::int64_t image = 0; image < batch; ++image) all.insert(all.end(), values.begin(), values.end());
  return all;
}

/// Runs the kernel; in a thread of its own if steps are to be reported from this one.
std::int32_t run_watched(tarflow_native_run& run, const Turn& turn) {
  if (!turn.on_step) return tarflow_native_invert(&run);
  std::int64_t progress = 0, told = 0;
  run.progress = &progress;
  const auto tell = [&] {
    const std::int64_t done = __atomic_load_n(&progress, __ATOMIC_RELAXED) / run.batch;
    if (done <= told || turn.call.cancelled()) return;
    told = done;
    turn.on_step(done);
  };
  // Where no thread can be had, `get` runs the kernel here. The destructor waits for the kernel to end.
  std::future<std::int32_t> made = std::async([&run] { return tarflow_native_invert(&run); });
  try {
    while (made.wait_for(kLook) == std::future_status::timeout) tell();
    const std::int32_t status = made.get();
    tell();
    return status;
  } catch (...) {
    turn.call.cancel();
    throw;
  }
}

}  // namespace

AlignedBytes::AlignedBytes(std::size_t size)
    : memory_(::operator new(size, std::align_val_t{TARFLOW_NATIVE_ALIGNMENT})), size_(size) {}

void AlignedBytes::Free::operator()(void* memory) const noexcept {
  ::operator delete(memory, std::align_val_t{TARFLOW_NATIVE_ALIGNMENT});
}

bool NativeEngine::reads(const std::string& precision) {
  return precision == "float32" || precision == "bfloat16" || precision == "int8";
}

NativeEngine::NativeEngine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger, std::string library)
    : Engine(std::move(bundle), threads, logger), library_(std::move(library)),
      packed_bytes_([this] {
        const tarflow_native_shape shape = shape_of(config());
        return tarflow_native_packed_bytes(&shape, this->bundle().precision.c_str());
      }()),
      blocks_(packed_bytes_ == 0 ? 1 : kPackedBytes / static_cast<std::int64_t>(packed_bytes_)) {
  if (!reads(this->bundle().precision))
    throw engine_error("engine native reads float32, bfloat16, int8, bundle " + this->bundle().name() + " is of " +
                           this->bundle().precision,
                       "use engine ort-cpu");
  if (packed_bytes_ == 0) check(TARFLOW_NATIVE_BAD_SHAPE);
  logger(TARFLOW_LOG_INFO, std::string("engine native on ") + kernel());
}

const char* NativeEngine::kernel() const { return tarflow_native_kernel(0); }

void NativeEngine::invert(const Turn& turn, Floats& patches) const {
  const Config& c = config();
  const tarflow_native_shape shape = shape_of(c);
  const std::shared_ptr<const AlignedBytes> block = packed(turn.block);
  const std::int64_t batch = batch_of(patches), branches = turn.branches();
  const bool reversed = bundle().blocks[static_cast<std::size_t>(turn.block)].reversed;
  const Floats guidance = branches == 2 ? repeated(turn.guidance, batch) : Floats{};
  Floats inverse_temperature;
  for (const float value : turn.inverse_temperature)
    inverse_temperature.insert(inverse_temperature.end(), static_cast<std::size_t>(batch), value);
  AlignedBytes workspace = take_workspace(tarflow_native_workspace_bytes(&shape, batch, branches, threads()));
  if (reversed) reverse(patches, c);
  tarflow_native_run run{};
  run.struct_size = sizeof run;
  run.packed = block->data();
  run.packed_bytes = block->size();
  run.batch = batch;
  run.branches = branches;
  run.steps = c.patches - 1;
  run.threads = threads();
  run.noise = run.x = patches.data();
  run.labels = turn.labels.empty() ? nullptr : turn.labels.data();
  run.guidance = guidance.data();
  run.inverse_temperature = inverse_temperature.data();
  run.workspace = workspace.data();
  run.workspace_bytes = workspace.size();
  run.cancel = turn.call.word();
  const std::int32_t status = run_watched(run, turn);
  give_workspace(std::move(workspace));
  turn.call.check();
  check(status);
  if (reversed) reverse(patches, c);
}

Floats NativeEngine::forward(std::int64_t block, const Floats& patches, const Labels& labels, const Call& call,
                             std::vector<double>& log_det) const {
  const Config& c = config();
  const tarflow_native_shape shape = shape_of(c);
  const std::shared_ptr<const AlignedBytes> weights = packed(block);
  const bool reversed = bundle().blocks[static_cast<std::size_t>(block)].reversed;
  const std::int64_t batch = batch_of(patches);
  AlignedBytes workspace = take_workspace(tarflow_native_forward_bytes(&shape, batch, threads()));
  Floats x = patches, z(patches.size());
  if (reversed) reverse(x, c);
  std::vector<double> added(static_cast<std::size_t>(batch));
  tarflow_native_pass pass{};
  pass.struct_size = sizeof pass;
  pass.packed = weights->data();
  pass.packed_bytes = weights->size();
  pass.batch = batch;
  pass.threads = threads();
  pass.x = x.data();
  pass.z = z.data();
  pass.log_det = added.data();
  pass.labels = labels.empty() ? nullptr : labels.data();
  pass.workspace = workspace.data();
  pass.workspace_bytes = workspace.size();
  pass.cancel = call.word();
  const std::int32_t status = tarflow_native_forward(&pass);
  give_workspace(std::move(workspace));
  call.check();
  check(status);
  if (reversed) reverse(z, c);
  for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += added[i];
  return z;
}

Floats NativeEngine::vjp(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
                         const Call& call) const {
  return ort_cpu().vjp(patches, labels, cotangent, call);
}

void NativeEngine::prepare_vjp() const { ort_cpu(); }

std::shared_ptr<const AlignedBytes> NativeEngine::packed(std::int64_t block) const {
  return blocks_.get(block, [&] {
    logger()(TARFLOW_LOG_INFO, "packing the weights of block " + std::to_string(block));
    std::vector<tarflow_native_tensor> tensors;
    for (const auto& [name, tensor] : bundle().tensors)
      tensors.push_back({name.c_str(), tensor.dtype.c_str(), tensor.shape.data(),
                         static_cast<std::int64_t>(tensor.shape.size()), tensor.offset});
    const tarflow_native_shape shape = shape_of(config());
    const MappedFile weights(bundle().blocks[static_cast<std::size_t>(block)].weights);
    auto made = std::make_shared<const AlignedBytes>(packed_bytes_);
    const char* culprit = nullptr;
    const std::int32_t status =
        tarflow_native_pack(&shape, bundle().precision.c_str(), tensors.data(),
                            static_cast<std::int64_t>(tensors.size()), weights.data(), weights.size(), made->data(),
                            made->size(), &culprit);
    check(status, culprit);
    return made;
  });
}

/// What runs the denoiser, opened when it is first needed.
const Engine& NativeEngine::ort_cpu() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!ort_cpu_)
    ort_cpu_ =
        std::make_unique<const OrtCpuEngine>(shared_bundle(), threads(), logger(), library_, "the denoiser");
  return *ort_cpu_;
}

AlignedBytes NativeEngine::take_workspace(std::size_t size) const {
  AlignedBytes taken;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!workspaces_.empty()) {
      taken = std::move(workspaces_.back());
      workspaces_.pop_back();
    }
  }
  if (taken.size() < size) {
    taken = {};
    taken = AlignedBytes(size);
  }
  return taken;
}

void NativeEngine::give_workspace(AlignedBytes workspace) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  workspaces_.push_back(std::move(workspace));
}

}  // namespace tarflow::detail

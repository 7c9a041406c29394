#include "flow.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.hpp"

namespace tarflow::detail {
namespace {

constexpr std::int64_t kActivationBytes = 128 << 20;  // of one run of a forward or gradient graph

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// Memory that ONNX Runtime reads and writes in place; zeroed, 64-byte aligned.
class Buffer {
 public:
  Buffer(std::vector<std::int64_t> shape, ONNXTensorElementDataType type, std::size_t item) : shape_(std::move(shape)) {
    std::size_t bytes = item;
    for (const std::int64_t length : shape_) bytes *= size(length);
    memory_.resize(bytes / 64 + 2);
    value_ = Ort::Value::CreateTensor(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU), memory_.data(),
                                      bytes, shape_.data(), shape_.size(), type);
  }
  static Buffer floats(std::vector<std::int64_t> shape) {
    return {std::move(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, sizeof(float)};
  }
  static Buffer integers(std::vector<std::int64_t> shape) {
    return {std::move(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, sizeof(std::int64_t)};
  }
  template <typename T>
  T* as() { return reinterpret_cast<T*>(memory_.data()); }
  const Ort::Value& value() const { return value_; }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64] = {};
  };
  std::vector<std::int64_t> shape_;
  std::vector<Line> memory_;
  Ort::Value value_{nullptr};
};

/// A session with inputs and outputs bound once to buffers that are read and written in place.
class BoundRun {
 public:
  explicit BoundRun(Ort::Session& session) : session_(session), binding_(session) {}
  void input(const std::string& name, const Buffer& buffer) { binding_.BindInput(name.c_str(), buffer.value()); }
  void output(const std::string& name, const Buffer& buffer) { binding_.BindOutput(name.c_str(), buffer.value()); }
  void run() { session_.Run(options_, binding_); }

 private:
  Ort::Session& session_;
  Ort::IoBinding binding_;
  Ort::RunOptions options_;
};

std::int64_t batch_of(const Floats& patches, const Config& config) {
  return static_cast<std::int64_t>(patches.size()) / config.dims();
}

void divide_by_root(Floats& values, const Floats& prior) {
  for (std::size_t i = 0; i < values.size() && !prior.empty(); ++i) values[i] /= std::sqrt(prior[i % prior.size()]);
}

}  // namespace

Model::Model(Bundle bundle, int threads) : bundle_(std::move(bundle)), threads_(threads) {
  sessions_.resize(bundle_.blocks.size());
}

Ort::Session& Model::session(std::int64_t block, Graph graph) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& place = sessions_[size(block)][static_cast<std::size_t>(graph)];
  if (!place) {
    const Block& files = bundle_.blocks[size(block)];
    const std::string& path = graph == Graph::forward ? files.forward : graph == Graph::step ? files.step : files.gradient;
    place = std::make_unique<Ort::Session>(open_session(path, threads_));
  }
  return *place;
}

std::int64_t Sampler::images_per_run() const {
  const Config& c = model_->config();
  const std::int64_t image_bytes = 4 * c.patches() * (4 * c.heads() * c.patches() + 20 * c.width);
  return std::max<std::int64_t>(1, kActivationBytes / image_bytes);
}

Floats Sampler::decode(Floats x, const Labels& labels, const Guidance& guidance, const OnStep& on_step) const {
  const Floats& prior = model_->bundle().prior;
  for (std::size_t i = 0; i < x.size() && !prior.empty(); ++i) x[i] *= std::sqrt(prior[i % prior.size()]);
  for (std::int64_t block = model_->config().blocks - 1; block >= 0; --block)
    x = inverse_block(block, x, labels, guidance, on_step);
  return x;
}

/// x_0 = z_0;  x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2, in block order.
Floats Sampler::inverse_block(std::int64_t block, const Floats& z, const Labels& labels, const Guidance& guidance,
                              const OnStep& on_step) const {
  const Config& c = model_->config();
  const std::int64_t batch = batch_of(z, c), patches = c.patches(), values = c.patch_values();
  const std::int64_t branches = guidance.branches();
  const bool reversed = model_->bundle().blocks[size(block)].reversed;
  const auto place = [&](std::int64_t image, std::int64_t position) {
    return (image * patches + (reversed ? patches - 1 - position : position)) * values;
  };

  Buffer patch = Buffer::floats({batch, 1, values});
  Buffer noise = Buffer::floats({batch, patches, values});
  Buffer weights = Buffer::floats({2, patches});
  Buffer position = Buffer::integers({batch});
  Buffer inverse_temperature = Buffer::floats({branches});
  Buffer classes = Buffer::integers({branches, batch});
  std::copy(z.begin(), z.end(), noise.as<float>());
  for (std::int64_t image = 0; image < batch; ++image)
    std::copy_n(z.data() + place(image, 0), values, patch.as<float>() + image * values);
  for (std::int64_t i = 0; i < patches; ++i) {
    double g = guidance.weight;
    if (guidance.anneal) g = g * static_cast<double>(i + 1) / static_cast<double>(patches - 1);
    weights.as<float>()[i] = static_cast<float>(guidance.guide_a ? g : 0.0);
    weights.as<float>()[patches + i] = static_cast<float>(guidance.guide_b ? g : 0.0);
  }
  inverse_temperature.as<float>()[0] = 1.0F;
  if (branches == 2) inverse_temperature.as<float>()[1] = static_cast<float>(1.0 / guidance.temperature);

  BoundRun run(model_->session(block, Graph::step));
  run.input("patches", patch);
  run.input("noise", noise);
  run.input("guidance", weights);
  run.input("position", position);
  run.input("inverse_temperature", inverse_temperature);
  if (!labels.empty()) {
    std::copy(labels.begin(), labels.end(), classes.as<std::int64_t>());
    if (branches == 2) std::fill_n(classes.as<std::int64_t>() + batch, batch, c.classes);
    run.input("labels", classes);
  }
  // The caches are bound as inputs and as outputs: the graph updates them in place. Zeroed, because masked attention
  // multiplies unwritten entries by zero, and zero times stray NaN is NaN.
  const bool half = model_->bundle().half_cache;
  std::vector<Buffer> caches;
  caches.reserve(size(2 * c.layers));
  for (std::int64_t layer = 0; layer < c.layers; ++layer) {
    for (const char* kind : {"key_", "value_"}) {
      caches.emplace_back(std::vector<std::int64_t>{branches * batch, c.heads(), patches, c.head_dim},
                          half ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                          half ? std::size_t{2} : sizeof(float));
      const std::string name = kind + std::to_string(layer);
      run.input(name, caches.back());
      run.output("next_" + name, caches.back());
    }
  }
  // `next` may lie where `patches` does: it is written last, from values that needed all of `patches`.
  run.output("next", patch);

  Floats x = z;
  for (std::int64_t step = 0; step < patches - 1; ++step) {
    run.run();
    for (std::int64_t image = 0; image < batch; ++image) {
      std::copy_n(patch.as<float>() + image * values, values, x.data() + place(image, step + 1));
      position.as<std::int64_t>()[image] = step + 1;
    }
    on_step(block);
  }
  return x;
}

Floats Sampler::encode(Floats x, const Labels& labels, std::vector<double>& log_det, std::vector<Floats>* inputs) const {
  const Config& c = model_->config();
  const std::int64_t batch = batch_of(x, c);
  Buffer patches = Buffer::floats({batch, c.patches(), c.patch_values()});
  Buffer z = Buffer::floats({batch, c.patches(), c.patch_values()});
  Buffer block_log_det = Buffer::floats({batch});
  Buffer classes = Buffer::integers({batch});
  std::copy(labels.begin(), labels.end(), classes.as<std::int64_t>());
  log_det.assign(size(batch), 0.0);
  for (std::int64_t block = 0; block < c.blocks; ++block) {
    if (inputs != nullptr) inputs->push_back(x);
    BoundRun run(model_->session(block, Graph::forward));
    std::copy(x.begin(), x.end(), patches.as<float>());
    run.input("patches", patches);
    if (!labels.empty()) run.input("labels", classes);
    run.output("z", z);
    run.output("log_det", block_log_det);
    run.run();
    std::copy_n(z.as<float>(), x.size(), x.begin());
    for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += static_cast<double>(block_log_det.as<float>()[i]);
  }
  const Floats& prior = model_->bundle().prior;
  divide_by_root(x, prior);
  double log_prior = 0.0;
  for (const float variance : prior) log_prior += std::log(static_cast<double>(variance));
  for (double& value : log_det) value -= 0.5 * log_prior;
  return x;
}

Floats Sampler::score(const Floats& patches, const Labels& labels) const {
  const Config& c = model_->config();
  const std::int64_t batch = batch_of(patches, c);
  std::vector<Floats> inputs;
  std::vector<double> log_det;
  Floats cotangent = encode(patches, labels, log_det, &inputs);
  for (float& value : cotangent) value = -value;
  divide_by_root(cotangent, model_->bundle().prior);
  const std::vector<std::int64_t> shape = {batch, c.patches(), c.patch_values()};
  Buffer x = Buffer::floats(shape), upstream = Buffer::floats(shape), gradient = Buffer::floats(shape);
  Buffer classes = Buffer::integers({batch});
  std::copy(labels.begin(), labels.end(), classes.as<std::int64_t>());
  for (std::int64_t block = c.blocks - 1; block >= 0; --block) {
    std::copy(inputs[size(block)].begin(), inputs[size(block)].end(), x.as<float>());
    std::copy(cotangent.begin(), cotangent.end(), upstream.as<float>());
    BoundRun run(model_->session(block, Graph::gradient));
    run.input("patches", x);
    run.input("cotangent", upstream);
    if (!labels.empty()) run.input("labels", classes);
    run.output("gradient", gradient);
    run.run();
    std::copy_n(gradient.as<float>(), cotangent.size(), cotangent.begin());
  }
  return cotangent;
}

std::vector<double> log_prob_of(const Floats& u, const std::vector<double>& log_det) {
  const std::size_t dims = u.size() / log_det.size();
  const double constant = 0.5 * std::log(2.0 * std::acos(-1.0)) * static_cast<double>(dims);
  std::vector<double> log_prob;
  for (std::size_t image = 0; image < log_det.size(); ++image) {
    double square = 0.0;
    for (std::size_t i = image * dims; i < (image + 1) * dims; ++i) square += static_cast<double>(u[i]) * u[i];
    log_prob.push_back(-0.5 * square - constant + log_det[image]);
  }
  return log_prob;
}

namespace {

/// Calls visit(index in the image, index in the patches) for every value of a batch.
template <typename Visit>
void each_value(std::int64_t batch, const Config& c, Visit visit) {
  const std::int64_t p = c.patch_size, across = c.image_size / p;
  std::int64_t pixel = 0;
  for (std::int64_t image = 0; image < batch; ++image)
    for (std::int64_t channel = 0; channel < c.image_channels; ++channel)
      for (std::int64_t y = 0; y < c.image_size; ++y)
        for (std::int64_t x = 0; x < c.image_size; ++x, ++pixel) {
          const std::int64_t patch = (y / p) * across + x / p;
          visit(size(pixel), size(image * c.dims() + patch * c.patch_values() + (channel * p + y % p) * p + x % p));
        }
}

}  // namespace

Floats patchify(const float* images, std::int64_t batch, const Config& config) {
  Floats patches(size(batch * config.dims()));
  each_value(batch, config, [&](std::size_t pixel, std::size_t value) { patches[value] = images[pixel]; });
  return patches;
}

void unpatchify(const Floats& patches, std::int64_t batch, const Config& config, float* images) {
  each_value(batch, config, [&](std::size_t pixel, std::size_t value) { images[pixel] = patches[value]; });
}

}  // namespace tarflow::detail

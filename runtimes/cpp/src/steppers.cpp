#include "steppers.hpp"

#include <algorithm>
#include <cstring>
#include <string>

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// Noise and finished patches in block order, [N, B, D]: a step reads and writes one contiguous slab.
class PatchLog {
 public:
  PatchLog(const StepInputs& inputs, const Config& config)
      : reversed_(inputs.reversed), batch_(inputs.batch), patches_(config.patches()), values_(config.patch_values()) {
    noise_.resize(size(batch_ * config.dims()));
    each([&](std::size_t here, std::size_t image_order) {
      std::copy_n(inputs.noise + image_order, values_, noise_.data() + here);
    });
    finished_ = noise_;
  }
  const float* noise(std::int64_t position) const { return noise_.data() + position * batch_ * values_; }
  float* finished(std::int64_t position) { return finished_.data() + position * batch_ * values_; }
  std::int64_t slab() const { return batch_ * values_; }
  void result(float* patches) const {
    each([&](std::size_t here, std::size_t image_order) {
      std::copy_n(finished_.data() + here, values_, patches + image_order);
    });
  }

 private:
  template <typename Visit>
  void each(Visit visit) const {
    for (std::int64_t position = 0; position < patches_; ++position) {
      const std::int64_t place = reversed_ ? patches_ - 1 - position : position;
      for (std::int64_t image = 0; image < batch_; ++image)
        visit(size((position * batch_ + image) * values_), size((image * patches_ + place) * values_));
    }
  }
  bool reversed_;
  std::int64_t batch_, patches_, values_;
  Floats noise_, finished_;
};

/// Calls bind(name, buffer) for the caches of every layer.
template <typename Make>
void bind_caches(BoundRun& run, std::vector<Buffer>& caches, const Config& config, const StepInputs& inputs,
                 Make make) {
  caches.reserve(size(2 * config.layers));
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (const char* kind : {"key_", "value_"}) {
      caches.push_back(make(Shape{inputs.rows(), config.heads(), config.patches(), config.head_dim},
                            inputs.cache_type()));
      const std::string name = kind + std::to_string(layer);
      run.input(name, caches.back().value());  // also an output: the graph updates them in place
      run.output("next_" + name, caches.back().value());
    }
  }
}

class PortableStepper final : public Stepper {
 public:
  PortableStepper(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs)
      : log_(inputs, config), position_(Buffer::integers({inputs.batch})),
        patch_(Buffer::floats({inputs.batch, 1, config.patch_values()})),
        noise_(Buffer::floats({inputs.batch, config.patches(), config.patch_values()})),
        guidance_(Buffer::floats({2, config.patches()})),
        inverse_temperature_(Buffer::floats({inputs.branches()})),
        labels_(Buffer::integers({inputs.branches(), inputs.batch})), run_(std::move(session)) {
    std::copy_n(log_.noise(0), log_.slab(), patch_.as<float>());
    std::copy_n(inputs.noise, inputs.batch * config.dims(), noise_.as<float>());
    std::copy_n(inputs.guidance, 2 * config.patches(), guidance_.as<float>());
    std::copy(inputs.inverse_temperature.begin(), inputs.inverse_temperature.end(), inverse_temperature_.as<float>());
    std::copy(inputs.labels.begin(), inputs.labels.end(), labels_.as<std::int64_t>());
    run_.input("patches", patch_.value());
    run_.input("noise", noise_.value());
    run_.input("guidance", guidance_.value());
    run_.input("position", position_.value());
    run_.input("inverse_temperature", inverse_temperature_.value());
    run_.input("labels", labels_.value());
    // Zeroed: masked attention multiplies unwritten entries by zero, and zero times stray NaN is NaN.
    bind_caches(run_, caches_, config, inputs,
                [](const Shape& shape, ONNXTensorElementDataType type) { return Buffer(shape, type); });
    // `next` may lie where `patches` does: it is written last, from values that needed all of `patches`.
    run_.output("next", patch_.value());
  }
  void advance() override {
    run_();
    ++step_;
    std::copy_n(patch_.as<float>(), log_.slab(), log_.finished(step_));
    std::fill_n(position_.as<std::int64_t>(), position_.shape()[0], step_);
  }
  void result(float* patches) const override { log_.result(patches); }

 private:
  PatchLog log_;
  std::int64_t step_ = 0;
  Buffer position_, patch_, noise_, guidance_, inverse_temperature_, labels_;
  std::vector<Buffer> caches_;
  BoundRun run_;
};

/// Its attention reads the written entries of the caches alone, so that they may come from a pool as they are.
class SequentialStepper final : public Stepper {
 public:
  SequentialStepper(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs,
                    std::shared_ptr<const SequentialTables> tables, CachePool& pool)
      : log_(inputs, config), tables_(std::move(tables)), pool_(pool), batch_(inputs.batch), rows_count_(inputs.rows()),
        width_(config.width), values_(config.patch_values()), weights_(step_weights(inputs.guidance, config)),
        rows_(Buffer::floats({rows_count_, values_})), embedding_(Buffer::floats({rows_count_, width_})),
        z_(Buffer::floats({batch_, values_})),
        g_(Buffer::floats({1, static_cast<std::int64_t>(weights_.size()) / config.patches()})),
        lengths_({rows_count_}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32), total_({1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32),
        factor_({rows_count_, 3 * width_}, inputs.cache_type()), run_(session) {
    class_rows_.resize(size(rows_count_ * width_));
    for (std::int64_t row = 0; row < rows_count_ && !tables_->class_embed.empty(); ++row)
      std::copy_n(tables_->class_embed.data() + inputs.labels[size(row)] * width_, width_,
                  class_rows_.data() + row * width_);
    for (std::int64_t branch = 0; branch < inputs.branches(); ++branch)
      std::copy_n(log_.noise(0), log_.slab(), rows_.as<float>() + branch * log_.slab());
    fill_query_factor(factor_, inputs.inverse_temperature, batch_, width_);
    run_.input("rows", rows_.value());
    run_.input("embedding", embedding_.value());
    run_.input("z", z_.value());
    run_.input("g", g_.value());
    run_.input("lengths", lengths_.value());
    run_.input("total", total_.value());
    run_.input("query_factor", factor_.value());
    bind_caches(run_, caches_, config, inputs,
                [&](const Shape& shape, ONNXTensorElementDataType type) { return pool.take(shape, type); });
    next_ = rows_.view({batch_, values_});  // written last, from values that needed all of the rows
    run_.output("next", next_);
  }
  ~SequentialStepper() override {
    for (Buffer& cache : caches_) pool_.give(std::move(cache));
  }
  void advance() override {
    const float* place = tables_->pos_embed.data() + step_ * width_;
    for (std::int64_t row = 0; row < rows_count_; ++row) {
      const float* from = class_rows_.data() + row * width_;
      float* to = embedding_.as<float>() + row * width_;
      for (std::int64_t i = 0; i < width_; ++i) to[i] = from[i] + place[i];
    }
    std::fill_n(lengths_.as<std::int32_t>(), rows_count_, static_cast<std::int32_t>(step_));
    *total_.as<std::int32_t>() = static_cast<std::int32_t>(step_ + 1);
    std::copy_n(log_.noise(step_ + 1), log_.slab(), z_.as<float>());
    std::copy_n(weights_.data() + step_ * g_.shape()[1], g_.shape()[1], g_.as<float>());
    run_();
    ++step_;
    std::copy_n(rows_.as<float>(), log_.slab(), log_.finished(step_));
    if (rows_count_ > batch_) std::copy_n(rows_.as<float>(), log_.slab(), rows_.as<float>() + log_.slab());
  }
  void result(float* patches) const override { log_.result(patches); }

 private:
  PatchLog log_;
  std::shared_ptr<const SequentialTables> tables_;
  CachePool& pool_;
  std::int64_t step_ = 0, batch_, rows_count_, width_, values_;
  Floats weights_, class_rows_;
  Buffer rows_, embedding_, z_, g_, lengths_, total_, factor_;
  std::vector<Buffer> caches_;
  Ort::Value next_{nullptr};
  BoundRun run_;
};

}  // namespace

bool StepInputs::temperature() const {
  return std::any_of(inverse_temperature.begin(), inverse_temperature.end(), [](float one) { return one != 1.0F; });
}

void fill_query_factor(Buffer& factor, const Floats& inverse_temperature, std::int64_t repeat, std::int64_t width) {
  const bool half = factor.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  for (std::int64_t row = 0; row < factor.shape()[0]; ++row) {
    for (std::int64_t i = 0; i < 3 * width; ++i) {
      const float value = i < width ? inverse_temperature[size(row / repeat)] : 1.0F;
      if (half)
        factor.as<Ort::Float16_t>()[row * 3 * width + i] = Ort::Float16_t(value);
      else
        factor.as<float>()[row * 3 * width + i] = value;
    }
  }
}

Floats step_weights(const float* guidance, const Config& config) {
  Floats weights;
  for (std::int64_t i = 0; i < config.patches(); ++i) {
    for (const std::int64_t kind : {0, 1}) {
      if (kind == 0 && !config.nvp) continue;
      weights.insert(weights.end(), size(config.patch_values()), guidance[kind * config.patches() + i]);
    }
  }
  return weights;
}

std::unique_ptr<Stepper> portable_stepper(std::shared_ptr<Session> session, const Config& config,
                                          const StepInputs& inputs) {
  return std::make_unique<PortableStepper>(std::move(session), config, inputs);
}

std::unique_ptr<Stepper> sequential_stepper(std::shared_ptr<Session> session, const Config& config,
                                            const StepInputs& inputs, std::shared_ptr<const SequentialTables> tables,
                                            CachePool& pool) {
  return std::make_unique<SequentialStepper>(std::move(session), config, inputs, std::move(tables), pool);
}

}  // namespace tarflow::detail

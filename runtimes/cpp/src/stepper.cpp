#include "stepper.hpp"

#include <algorithm>
#include <string>

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

Floats step_weights(const float* guidance, const Config& config) {
  Floats weights;
  for (std::int64_t i = 0; i < config.patches; ++i) {
    for (const std::int64_t kind : {0, 1}) {
      if (kind == 1 || config.nvp)
        weights.insert(weights.end(), size(config.patch_values), guidance[kind * config.patches + i]);
    }
  }
  return weights;
}

ONNXTensorElementDataType cache_type(const StepInputs& inputs) {
  return inputs.half_cache ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

}  // namespace

PatchLog::PatchLog(const StepInputs& inputs, const Config& config)
    : reversed_(inputs.reversed), batch_(inputs.batch), patches_(config.patches), values_(config.patch_values) {
  noise_.resize(size(batch_ * config.dims()));
  each([&](std::size_t here, std::size_t there) { std::copy_n(inputs.noise + there, values_, noise_.data() + here); });
  finished_ = noise_;
}

void PatchLog::result(float* patches) const {
  each([&](std::size_t here, std::size_t there) { std::copy_n(finished_.data() + here, values_, patches + there); });
}

/// Calls visit(offset in block order [N, B, D], offset in the order of the data [B, N, D]) for every patch.
template <typename Visit>
void PatchLog::each(Visit visit) const {
  for (std::int64_t position = 0; position < patches_; ++position) {
    const std::int64_t place = reversed_ ? patches_ - 1 - position : position;
    for (std::int64_t image = 0; image < batch_; ++image)
      visit(size((position * batch_ + image) * values_), size((image * patches_ + place) * values_));
  }
}

Stepper::Stepper(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs,
                 std::shared_ptr<const EmbeddingTables> tables, CachePool& pool)
    : log_(inputs, config), tables_(std::move(tables)), pool_(pool), batch_(inputs.batch), rows_count_(inputs.rows()),
      width_(config.width), values_(config.patch_values), weights_(step_weights(inputs.guidance, config)),
      rows_(Buffer::floats({rows_count_, values_})), embedding_(Buffer::floats({rows_count_, width_})),
      z_(Buffer::floats({batch_, values_})),
      g_(Buffer::floats({batch_, static_cast<std::int64_t>(weights_.size()) / config.patches})),
      lengths_({rows_count_}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32), total_({1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32),
      query_factor_({rows_count_, 3 * width_}, cache_type(inputs)),
      next_(rows_.view({batch_, values_})),  // written last, from values that needed all of the rows
      run_(std::move(session)) {
  class_rows_.resize(size(rows_count_ * width_));
  for (std::int64_t row = 0; row < rows_count_ && !tables_->class_embed.empty(); ++row)
    std::copy_n(tables_->class_embed.data() + inputs.labels[size(row)] * width_, width_,
                class_rows_.data() + row * width_);
  for (std::int64_t branch = 0; branch < inputs.branches(); ++branch)
    std::copy_n(log_.noise(0), log_.slab(), rows_.as<float>() + branch * log_.slab());
  fill_query_factor(inputs.inverse_temperature);
  run_.input("rows", rows_.value());
  run_.input("embedding", embedding_.value());
  run_.input("z", z_.value());
  run_.input("g", g_.value());
  run_.input("lengths", lengths_.value());
  run_.input("total", total_.value());
  run_.input("query_factor", query_factor_.value());
  run_.output("next", next_);
  bind_caches(config, inputs);
}

/// The graph's attention reads the written entries of the caches alone, so that they come from the pool as they are.
void Stepper::bind_caches(const Config& config, const StepInputs& inputs) {
  caches_.reserve(size(2 * config.layers));
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (const char* kind : {"key_", "value_"}) {
      caches_.push_back(
          pool_.take({rows_count_, config.heads(), config.patches, config.head_dim}, cache_type(inputs)));
      const std::string name = kind + std::to_string(layer);
      run_.input(name, caches_.back().value());
      run_.output("next_" + name, caches_.back().value());  // in place
    }
  }
}

/// 1/tau of the row's branch in the first W columns, 1 in the others.
void Stepper::fill_query_factor(const Floats& inverse_temperature) {
  const bool half = query_factor_.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  for (std::int64_t i = 0; i < rows_count_ * 3 * width_; ++i) {
    const std::int64_t row = i / (3 * width_), column = i % (3 * width_);
    const float value = column < width_ ? inverse_temperature[size(row / batch_)] : 1.0F;
    if (half)
      query_factor_.as<Ort::Float16_t>()[i] = Ort::Float16_t(value);
    else
      query_factor_.as<float>()[i] = value;
  }
}

Stepper::~Stepper() {
  for (Buffer& cache : caches_) pool_.give(std::move(cache));
}

void Stepper::advance() {
  const float* place = tables_->pos_embed.data() + step_ * width_;
  for (std::int64_t row = 0; row < rows_count_; ++row) {
    const float* from = class_rows_.data() + row * width_;
    float* to = embedding_.as<float>() + row * width_;
    for (std::int64_t i = 0; i < width_; ++i) to[i] = from[i] + place[i];
  }
  std::fill_n(lengths_.as<std::int32_t>(), rows_count_, static_cast<std::int32_t>(step_));
  *total_.as<std::int32_t>() = static_cast<std::int32_t>(step_ + 1);
  std::copy_n(log_.noise(step_ + 1), log_.slab(), z_.as<float>());
  const std::int64_t columns = g_.shape()[1];
  for (std::int64_t image = 0; image < batch_; ++image)
    std::copy_n(weights_.data() + step_ * columns, columns, g_.as<float>() + image * columns);
  run_();
  ++step_;
  std::copy_n(rows_.as<float>(), log_.slab(), log_.finished(step_));
  if (rows_count_ > batch_) std::copy_n(rows_.as<float>(), log_.slab(), rows_.as<float>() + log_.slab());
}

}  // namespace tarflow::detail

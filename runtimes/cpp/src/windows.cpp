// The `Windows` of ONNX Runtime: on the rewritten step graph and on the portable one, one image each.
#include <algorithm>
#include <map>
#include <string>

#include "steppers.hpp"

namespace tarflow::detail {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// The caches of one image; what is bound besides them differs between windows of different lengths.
struct Caches {
  std::vector<std::string> names;
  std::vector<Buffer> buffers;

  void bind(BoundRun& run) const {
    for (std::size_t i = 0; i < names.size(); ++i) {
      run.input(names[i], buffers[i].value());
      run.output("next_" + names[i], buffers[i].value());
    }
  }
};

Caches caches_of(const Session& session, const Config& config, std::int64_t rows, ONNXTensorElementDataType type) {
  Caches made;
  for (const std::string& name : session.inputs()) {
    if (name.compare(0, 4, "key_") != 0 && name.compare(0, 6, "value_") != 0) continue;
    made.names.push_back(name);
    made.buffers.emplace_back(Shape{rows, config.heads(), config.patches(), config.head_dim}, type);
  }
  return made;
}

/// Row g * S + i of every input is patch i of branch g.
class RewrittenWindows final : public Windows {
 public:
  RewrittenWindows(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs,
                   std::shared_ptr<const SequentialTables> tables)
      : session_(std::move(session)), config_(config), inputs_(inputs),
        caches_(caches_of(*session_, config, 1, inputs.cache_type())), weights_(step_weights(inputs.guidance, config)) {
    const std::int64_t table = config.patches() * config.width;
    for (std::int64_t branch = 0; branch < inputs.branches(); ++branch) {
      embedding_.insert(embedding_.end(), tables->pos_embed.begin(), tables->pos_embed.end());
      if (tables->class_embed.empty()) continue;
      const float* row = tables->class_embed.data() + inputs.labels[size(branch)] * config.width;
      for (std::int64_t i = 0; i < table; ++i) embedding_[size(branch * table + i)] += row[i % config.width];
    }
  }
  void evaluate(std::int64_t first, const float* patches, std::int64_t length, float* next) override {
    Bound& bound = bound_for(length);
    const std::int64_t values = config_.patch_values(), width = config_.width;
    const std::int64_t columns = bound.g.shape()[1];
    for (std::int64_t branch = 0; branch < inputs_.branches(); ++branch) {
      std::copy_n(patches, length * values, bound.rows.as<float>() + branch * length * values);
      std::copy_n(embedding_.data() + (branch * config_.patches() + first) * width, length * width,
                  bound.embedding.as<float>() + branch * length * width);
    }
    std::copy_n(inputs_.noise + (first + 1) * values, length * values, bound.z.as<float>());
    std::copy_n(weights_.data() + first * columns, length * columns, bound.g.as<float>());
    *bound.lengths.as<std::int32_t>() = static_cast<std::int32_t>(first + length - 1);
    *bound.total.as<std::int32_t>() = static_cast<std::int32_t>(first + length);
    bound.run();
    std::copy_n(bound.next.as<float>(), length * values, next);
  }

 private:
  struct Bound {
    Buffer rows, embedding, z, g, lengths, total, factor, next;
    BoundRun run;
  };
  Bound& bound_for(std::int64_t length) {
    const auto found = runs_.find(length);
    if (found != runs_.end()) return *found->second;
    const std::int64_t rows = inputs_.branches() * length, values = config_.patch_values();
    auto made = std::unique_ptr<Bound>(new Bound{
        Buffer::floats({rows, values}), Buffer::floats({rows, config_.width}), Buffer::floats({length, values}),
        Buffer::floats({length, static_cast<std::int64_t>(weights_.size()) / config_.patches()}),
        Buffer({1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32), Buffer({1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32),
        Buffer({rows, 3 * config_.width}, inputs_.cache_type()), Buffer::floats({length, values}), BoundRun(session_)});
    fill_query_factor(made->factor, inputs_.inverse_temperature, length, config_.width);
    made->run.input("rows", made->rows.value());
    made->run.input("embedding", made->embedding.value());
    made->run.input("z", made->z.value());
    made->run.input("g", made->g.value());
    made->run.input("lengths", made->lengths.value());
    made->run.input("total", made->total.value());
    made->run.input("query_factor", made->factor.value());
    made->run.output("next", made->next.value());
    caches_.bind(made->run);
    return *(runs_[length] = std::move(made));
  }

  std::shared_ptr<Session> session_;
  const Config& config_;
  StepInputs inputs_;
  Caches caches_;
  Floats weights_, embedding_;
  std::map<std::int64_t, std::unique_ptr<Bound>> runs_;
};

class PortableWindows final : public Windows {
 public:
  PortableWindows(std::shared_ptr<Session> session, const Config& config, const StepInputs& inputs)
      : session_(std::move(session)), config_(config),
        caches_(caches_of(*session_, config, inputs.rows(), inputs.cache_type())),
        noise_(Buffer::floats({1, config.patches(), config.patch_values()})),
        guidance_(Buffer::floats({2, config.patches()})),
        inverse_temperature_(Buffer::floats({inputs.branches()})), position_(Buffer::integers({1})),
        labels_(Buffer::integers({inputs.branches(), 1})) {
    for (std::int64_t i = 0; i < config.patches(); ++i)
      std::copy_n(inputs.noise + (inputs.reversed ? config.patches() - 1 - i : i) * config.patch_values(),
                  config.patch_values(), noise_.as<float>() + i * config.patch_values());
    std::copy_n(inputs.guidance, 2 * config.patches(), guidance_.as<float>());
    std::copy(inputs.inverse_temperature.begin(), inputs.inverse_temperature.end(), inverse_temperature_.as<float>());
    std::copy(inputs.labels.begin(), inputs.labels.end(), labels_.as<std::int64_t>());
  }
  void evaluate(std::int64_t first, const float* patches, std::int64_t length, float* next) override {
    Bound& bound = bound_for(length);
    std::copy_n(patches, length * config_.patch_values(), bound.patches.as<float>());
    *position_.as<std::int64_t>() = first;
    bound.run();
    std::copy_n(bound.next.as<float>(), length * config_.patch_values(), next);
  }

 private:
  struct Bound {
    Buffer patches, next;
    BoundRun run;
  };
  Bound& bound_for(std::int64_t length) {
    const auto found = runs_.find(length);
    if (found != runs_.end()) return *found->second;
    auto made = std::unique_ptr<Bound>(new Bound{Buffer::floats({1, length, config_.patch_values()}),
                                                 Buffer::floats({1, length, config_.patch_values()}),
                                                 BoundRun(session_)});
    made->run.input("patches", made->patches.value());
    made->run.input("noise", noise_.value());
    made->run.input("guidance", guidance_.value());
    made->run.input("position", position_.value());
    made->run.input("inverse_temperature", inverse_temperature_.value());
    made->run.input("labels", labels_.value());
    made->run.output("next", made->next.value());
    caches_.bind(made->run);
    return *(runs_[length] = std::move(made));
  }

  std::shared_ptr<Session> session_;
  const Config& config_;
  Caches caches_;
  Buffer noise_, guidance_, inverse_temperature_, position_, labels_;
  std::map<std::int64_t, std::unique_ptr<Bound>> runs_;
};

}  // namespace

std::unique_ptr<Windows> portable_windows(std::shared_ptr<Session> session, const Config& config,
                                          const StepInputs& inputs) {
  return std::make_unique<PortableWindows>(std::move(session), config, inputs);
}

std::unique_ptr<Windows> rewritten_windows(std::shared_ptr<Session> session, const Config& config,
                                           const StepInputs& inputs, std::shared_ptr<const SequentialTables> tables) {
  return std::make_unique<RewrittenWindows>(std::move(session), config, inputs, std::move(tables));
}

}  // namespace tarflow::detail

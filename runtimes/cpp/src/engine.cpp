#include "engine.hpp"

#include "cpus.hpp"
#include "error.hpp"
#include "native.hpp"
#include "ort_cpu.hpp"

namespace tarflow::detail {

Engine::Engine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger)
    : bundle_(std::move(bundle)), threads_(threads != 0 ? threads : usable_cpus()), logger_(logger) {}

std::int64_t Engine::batch_of(const Floats& patches) const {
  return static_cast<std::int64_t>(patches.size()) / config().dims();
}

std::shared_ptr<const Engine> open_engine(Bundle bundle, const EngineOptions& options, Logger logger) {
  const auto shared = std::make_shared<const Bundle>(std::move(bundle));
  std::string name = options.name;
  if (name.empty() || name == "auto") name = NativeEngine::reads(shared->precision) ? "native" : "ort-cpu";
  if (name == "native")
    return std::make_shared<const NativeEngine>(shared, options.threads, logger, options.ort_library);
  if (name == "ort-cpu")
    return std::make_shared<const OrtCpuEngine>(shared, options.threads, logger, options.ort_library, "engine ort-cpu");
  if (name == "ort-cuda" || name == "trt" || name == "trt-rtx")
    throw engine_error("engine " + name + " is not in libtarflow", "use native or ort-cpu, or Python: docs/GPU.md");
  throw engine_error("unknown engine '" + name + "'", "valid are native, ort-cpu, auto");
}

}  // namespace tarflow::detail

// The C ABI of the library and its models.
#include "c_api.hpp"

#include <new>

#include "arguments.hpp"
#include "noise.hpp"
#include "ort.hpp"

using namespace tarflow::detail;

namespace {

thread_local std::string last_message;
thread_local std::string last_hint;

}  // namespace

namespace tarflow::detail {

tarflow_status fail(tarflow_status status, const char* message, const char* hint) noexcept {
  try {
    last_message = message;
    last_hint = hint;
  } catch (...) {
    last_message.clear();
    last_hint.clear();
  }
  return status;
}

tarflow_status status_of_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return fail(error.status, error.what(), error.hint.c_str());
  } catch (const Ort::Exception& error) {
    return fail(TARFLOW_ERROR_ENGINE, error.what(), "check that the bundle and ONNX Runtime fit each other");
  } catch (const std::bad_alloc&) {
    return fail(TARFLOW_ERROR_MEMORY, "no memory", "use a smaller batch_size");
  } catch (const std::length_error&) {
    return fail(TARFLOW_ERROR_MEMORY, "no memory", "use a smaller batch_size");
  } catch (const std::exception& error) {
    return fail(TARFLOW_ERROR_INTERNAL, error.what(), "");
  } catch (...) {
    return fail(TARFLOW_ERROR_INTERNAL, "unknown failure", "callbacks must not throw");
  }
}

}  // namespace tarflow::detail

extern "C" {

uint32_t tarflow_abi_version(void) { return TARFLOW_ABI_VERSION; }

const char* tarflow_version(void) { return TARFLOW_VERSION; }

const char* tarflow_status_name(tarflow_status status) {
  switch (status) {
    case TARFLOW_OK: return "ok";
    case TARFLOW_ERROR_INPUT: return "input";
    case TARFLOW_ERROR_BUNDLE: return "bundle";
    case TARFLOW_ERROR_ENGINE: return "engine";
    case TARFLOW_ERROR_CANCELLED: return "cancelled";
    case TARFLOW_ERROR_MEMORY: return "memory";
    case TARFLOW_ERROR_INTERNAL: return "internal";
    default: return "unknown";
  }
}

const char* tarflow_last_message(void) { return last_message.c_str(); }

const char* tarflow_last_hint(void) { return last_hint.c_str(); }

const char* tarflow_ort_version(void) { return ort_version(); }

tarflow_status tarflow_noise(uint64_t seed, uint64_t first_index, int64_t n, int64_t patches, int64_t patch_values,
                             float* noise) {
  return guarded([&] {
    need(noise, "noise");
    check_count(n);
    if (patches < 1 || patch_values < 1 || patches > (int64_t{1} << 34) / patch_values)
      throw input_error("patches and patch_values must be positive, and an image have at most 2^34 values");
    check_first_index(first_index, n);
    for (int64_t image = 0; image < n; ++image)
      standard_normal(seed, first_index + static_cast<uint64_t>(image), patches * patch_values,
                      noise + image * patches * patch_values);
  });
}

void tarflow_model_options_defaults(tarflow_model_options* options, size_t size) {
  put_defaults(tarflow_model_options{}, options, size);
}

tarflow_status tarflow_model_open(const char* path, const tarflow_model_options* options, tarflow_model** model) {
  return guarded([&] {
    need(model, "model");
    *model = nullptr;
    need(path, "path");
    const auto chosen = given(options, tarflow_model_options_defaults, "options");
    if (chosen.threads < 0 || chosen.threads > 4096)
      throw input_error("threads must be 0 to 4096, got " + std::to_string(chosen.threads));
    const Logger logger{chosen.on_log, chosen.log_user_data};
    const auto text = [](const char* given) { return std::string(given != nullptr ? given : ""); };
    const EngineOptions engine{text(chosen.engine), chosen.threads, text(chosen.ort_library)};
    auto opened = std::make_unique<tarflow_model>();
    opened->engine = open_engine(open_bundle(path, chosen.skip_digests == 0), engine, logger);
    *model = opened.release();
  });
}

void tarflow_model_free(tarflow_model* model) { delete model; }

tarflow_status tarflow_model_config(const tarflow_model* model, tarflow_config* config) {
  return guarded([&] {
    need(model, "model");
    const Config& c = model->engine->config();
    tarflow_config filled{};
    filled.data = c.is_tokens ? TARFLOW_DATA_TOKENS : TARFLOW_DATA_IMAGE;
    filled.nvp = c.nvp ? 1 : 0;
    filled.image_size = c.image_size;
    filled.image_channels = c.image_channels;
    filled.patch_size = c.patch_size;
    filled.patches = c.patches;
    filled.patch_values = c.patch_values;
    filled.width = c.width;
    filled.blocks = c.blocks;
    filled.layers = c.layers;
    filled.head_dim = c.head_dim;
    filled.classes = c.classes;
    filled.noise_std = c.noise_std;
    std::memcpy(filled.digest, model->engine->bundle().digest.c_str(), sizeof filled.digest);
    put(filled, config, "config");
  });
}

tarflow_status tarflow_model_label(const tarflow_model* model, int64_t number, const char** name) {
  return guarded([&] {
    need(model, "model");
    need(name, "name");
    const auto& labels = model->engine->config().labels;
    if (number < 0 || number >= static_cast<int64_t>(labels.size()))
      throw input_error("class " + std::to_string(number) + " has no name in this bundle");
    *name = labels[static_cast<size_t>(number)].c_str();
  });
}

tarflow_status tarflow_model_engine(const tarflow_model* model, tarflow_engine* engine) {
  return guarded([&] {
    need(model, "model");
    const Engine& used = *model->engine;
    put({0, used.name(), ort_version(), used.bundle().precision.c_str(), used.threads(), used.kernel()}, engine,
        "engine");
  });
}

}  // extern "C"

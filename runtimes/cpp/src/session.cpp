#include "session.hpp"

#include <algorithm>
#include <cstdint>
#include <new>

#include "error.hpp"

namespace tarflow::detail {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the width of the widest vector load

std::string first_line(const Ort::Exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

/// What a session of ONNX Runtime has to say, to the model's logger.
void say(void* logger, OrtLoggingLevel severity, const char*, const char*, const char*, const char* message) try {
  const tarflow_log_level level = severity >= ORT_LOGGING_LEVEL_ERROR     ? TARFLOW_LOG_ERROR
                                  : severity == ORT_LOGGING_LEVEL_WARNING ? TARFLOW_LOG_WARNING
                                                                          : TARFLOW_LOG_INFO;
  (*static_cast<const Logger*>(logger))(level, std::string("ONNX Runtime: ") + message);
} catch (...) {  // nothing may be thrown through ONNX Runtime, whose threads call this too
}

Ort::SessionOptions options_of(const SessionSettings& settings) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(settings.threads);
  options.AddConfigEntry("session.intra_op.allow_spinning", settings.spinning ? "1" : "0");
  options.SetInterOpNumThreads(1);
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.AddConfigEntry("session.use_env_allocators", "1");
  Ort::ThrowOnError(Ort::GetApi().SetUserLoggingFunction(options, say, const_cast<Logger*>(settings.logger)));
  append_provider(options, settings.provider);
  return options;
}

Error refused(const std::string& folder, const Ort::Exception& error) {
  return engine_error("ONNX Runtime cannot open a graph of " + folder + ": " + first_line(error),
                      "check that the bundle, the engine and ONNX Runtime fit each other");
}

std::size_t size_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return 8;
    default: return 4;
  }
}

Ort::MemoryInfo host() { return Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU); }

}  // namespace

Session::Session(Ort::Session session) : session_(std::move(session)) {
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session_.GetInputCount(); ++i)
    inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
  for (std::size_t i = 0; i < session_.GetOutputCount(); ++i)
    outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
}

std::shared_ptr<Session> Session::of_file(const std::string& path, const SessionSettings& settings) {
  try {
    return std::shared_ptr<Session>(new Session(Ort::Session(ort_environment(), path.c_str(), options_of(settings))));
  } catch (const Ort::Exception& error) {
    throw refused(path.substr(0, path.rfind('/')), error);
  }
}

std::shared_ptr<Session> Session::of_bytes(const std::string& model, const std::string& folder,
                                           const SessionSettings& settings) {
  try {
    Ort::SessionOptions options = options_of(settings);
    options.AddConfigEntry("session.model_external_initializers_file_folder_path", folder.c_str());
    return std::shared_ptr<Session>(
        new Session(Ort::Session(ort_environment(), model.data(), model.size(), options)));
  } catch (const Ort::Exception& error) {
    throw refused(folder, error);
  }
}

bool Session::has_input(const std::string& name) const {
  return std::find(inputs_.begin(), inputs_.end(), name) != inputs_.end();
}

std::vector<Ort::Value> Session::run(const std::vector<const OrtValue*>& given, const std::vector<std::string>& names) {
  std::vector<const char*> input_names, output_names;
  for (const std::string& name : inputs_) input_names.push_back(name.c_str());
  for (const std::string& name : names) output_names.push_back(name.c_str());
  std::vector<OrtValue*> results(names.size(), nullptr);
  std::vector<Ort::Value> values;
  values.reserve(names.size());  // before there are results to lose
  const Ort::RunOptions options;
  try {
    Ort::ThrowOnError(Ort::GetApi().Run(session_, options, input_names.data(), given.data(), given.size(),
                                        output_names.data(), output_names.size(), results.data()));
  } catch (const Ort::Exception& error) {
    throw engine_error("ONNX Runtime failed in a run: " + first_line(error));
  }
  for (OrtValue* result : results) values.emplace_back(result);
  return values;
}

Buffer::Buffer(Shape shape, ONNXTensorElementDataType type) : shape_(std::move(shape)), type_(type) {
  bytes_ = size_of(type);
  for (const std::int64_t length : shape_) bytes_ *= static_cast<std::size_t>(length);
  memory_.reset(std::calloc(1, bytes_ + kAlignment));
  if (!memory_) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
  data_ = static_cast<unsigned char*>(memory_.get()) + (kAlignment - address % kAlignment) % kAlignment;
  value_ = view(shape_);
}

Ort::Value Buffer::view(const Shape& shape) const {
  return Ort::Value::CreateTensor(host(), data_, bytes_, shape.data(), shape.size(), type_);
}

Ort::Value borrowed(const float* values, const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t length : shape) count *= static_cast<std::size_t>(length);
  return Ort::Value::CreateTensor<float>(host(), const_cast<float*>(values), count, shape.data(), shape.size());
}

Ort::Value borrowed(const std::int64_t* values, const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t length : shape) count *= static_cast<std::size_t>(length);
  return Ort::Value::CreateTensor<std::int64_t>(host(), const_cast<std::int64_t*>(values), count, shape.data(),
                                                shape.size());
}

void BoundRun::operator()() {
  try {
    session_->ort().Run(options_, binding_);
  } catch (const Ort::Exception& error) {
    throw engine_error("ONNX Runtime failed in a step: " + first_line(error));
  }
}

}  // namespace tarflow::detail

#include "session.hpp"

#include <algorithm>
#include <cstdint>
#include <new>

#include "error.hpp"

namespace tarflow::detail {
namespace {

constexpr const char* kOtherGraph = "its manifest describes another graph: export the checkpoint again";
constexpr std::size_t kAlignment = 64;  // a cache line, and the width of the widest vector load

/// What a session of ONNX Runtime has to say, to the model's logger.
void say(void* logger, OrtLoggingLevel severity, const char*, const char*, const char*, const char* message) try {
  const tarflow_log_level level = severity >= ORT_LOGGING_LEVEL_ERROR     ? TARFLOW_LOG_ERROR
                                  : severity == ORT_LOGGING_LEVEL_WARNING ? TARFLOW_LOG_WARNING
                                                                          : TARFLOW_LOG_INFO;
  (*static_cast<const Logger*>(logger))(level, std::string("ONNX Runtime: ") + message);
} catch (...) {  // nothing may be thrown through ONNX Runtime, whose threads call this too
}

Ort::SessionOptions options_of(const Session::Settings& settings, const std::string& folder) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(settings.threads);
  options.AddConfigEntry("session.intra_op.allow_spinning", settings.spinning ? "1" : "0");
  options.SetInterOpNumThreads(1);
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.AddConfigEntry("session.use_env_allocators", "1");
  options.AddConfigEntry("session.model_external_initializers_file_folder_path", folder.c_str());
  Ort::ThrowOnError(Ort::GetApi().SetUserLoggingFunction(options, say, const_cast<Logger*>(settings.logger)));
  return options;
}

Error failed(const Graph& graph, const char* what, const Ort::Exception& error) {
  const std::string text = error.what();
  return engine_error("graph " + graph.name + ": ONNX Runtime " + what + ": " + text.substr(0, text.find('\n')),
                      "check that the bundle and ONNX Runtime fit each other");
}

Ort::Session open(const Graph& graph, const std::string& folder, const Session::Settings& settings) {
  try {
    return {ort_environment(), graph.bytes->data(), graph.bytes->size(), options_of(settings, folder)};
  } catch (const Ort::Exception& error) {
    throw failed(graph, "cannot open it", error);
  }
}

const char* name_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    default: return "another dtype";
  }
}

std::size_t size_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return 8;
    default: return 4;
  }
}

bool is_number(const std::string& axis) { return axis.find_first_not_of("0123456789") == std::string::npos; }

std::string text_of(const std::string& dtype, const std::vector<std::string>& shape) {
  std::string axes;
  for (const std::string& axis : shape) axes += (axes.empty() ? "" : ", ") + axis;
  return dtype + " [" + axes + "]";
}

/// Whether a shape is that of the manifest: one that the graph declares (`batch` 0), where axes that are left open are
/// -1, or that of a result for `batch` images, where symbols other than B stand for any length.
bool fits(const Shape& shape, const Array& array, std::int64_t batch) {
  if (shape.size() != array.shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const std::string& axis = array.shape[i];
    if (shape[i] < 0) continue;
    if (is_number(axis) ? std::to_string(shape[i]) != axis : batch == 0 || (axis == "B" && shape[i] != batch))
      return false;
  }
  return true;
}

void check(const Graph& graph, const char* kind, const Array& array, const Ort::ConstTensorTypeAndShapeInfo& info,
           std::int64_t batch) {
  const Shape shape = info.GetShape();
  const std::string dtype = name_of(info.GetElementType());
  if (dtype == array.dtype && fits(shape, array, batch)) return;
  std::vector<std::string> got;
  for (const std::int64_t axis : shape) got.push_back(axis < 0 ? "?" : std::to_string(axis));
  throw engine_error("graph " + graph.name + ": " + kind + " " + array.name + ": expected " +
                         text_of(array.dtype, array.shape) + ", got " + text_of(dtype, got),
                     kOtherGraph);
}

Ort::MemoryInfo host() { return Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU); }

template <typename T>
Ort::Value borrow(const T* values, const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t length : shape) count *= static_cast<std::size_t>(length);
  return Ort::Value::CreateTensor<T>(host(), const_cast<T*>(values), count, shape.data(), shape.size());
}

}  // namespace

Session::Session(const Graph& graph, const std::string& folder, const Settings& settings)
    : graph_(graph), session_(open(graph, folder, settings)) {
  check_declared(true);
  check_declared(false);
}

/// Whether the graph itself declares the inputs or the outputs that the manifest lists.
void Session::check_declared(bool inputs) const {
  Ort::AllocatorWithDefaultOptions allocator;
  const std::vector<Array>& arrays = inputs ? graph_.inputs : graph_.outputs;
  const char* kind = inputs ? "input" : "output";
  const std::size_t count = inputs ? session_.GetInputCount() : session_.GetOutputCount();
  for (std::size_t i = 0; i < count; ++i) {
    const std::string name =
        (inputs ? session_.GetInputNameAllocated(i, allocator) : session_.GetOutputNameAllocated(i, allocator)).get();
    const auto array = std::find_if(arrays.begin(), arrays.end(), [&](const Array& one) { return one.name == name; });
    const Ort::TypeInfo type = inputs ? session_.GetInputTypeInfo(i) : session_.GetOutputTypeInfo(i);
    if (array == arrays.end() || count != arrays.size() || type.GetONNXType() != ONNX_TYPE_TENSOR)
      throw engine_error("graph " + graph_.name + " has " + std::to_string(count) + " " + kind + "s, among them " +
                             name + ", and the manifest lists others",
                         kOtherGraph);
    check(graph_, kind, *array, type.GetTensorTypeAndShapeInfo(), 0);
  }
}

bool Session::has_input(const std::string& name) const {
  return std::any_of(graph_.inputs.begin(), graph_.inputs.end(), [&](const Array& one) { return one.name == name; });
}

std::map<std::string, Ort::Value> Session::run(const std::map<std::string, const OrtValue*>& arrays,
                                               std::int64_t batch) {
  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> given;
  for (const Array& input : graph_.inputs) {
    input_names.push_back(input.name.c_str());
    given.push_back(arrays.at(input.name));
  }
  for (const Array& output : graph_.outputs) output_names.push_back(output.name.c_str());
  std::vector<OrtValue*> results(output_names.size(), nullptr);
  std::vector<Ort::Value> values;
  values.reserve(results.size());  // before there are results to lose
  const Ort::RunOptions options;
  try {
    Ort::ThrowOnError(Ort::GetApi().Run(session_, options, input_names.data(), given.data(), given.size(),
                                        output_names.data(), output_names.size(), results.data()));
  } catch (const Ort::Exception& error) {
    throw failed(graph_, "failed in a run", error);
  }
  for (OrtValue* result : results) values.emplace_back(result);
  std::map<std::string, Ort::Value> named;
  for (std::size_t i = 0; i < values.size(); ++i) {
    check(graph_, "output", graph_.outputs[i], values[i].GetTensorTypeAndShapeInfo().GetConst(), batch);
    named.emplace(graph_.outputs[i].name, std::move(values[i]));
  }
  return named;
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

Ort::Value borrowed(const float* values, const Shape& shape) { return borrow(values, shape); }
Ort::Value borrowed(const std::int64_t* values, const Shape& shape) { return borrow(values, shape); }

void BoundRun::operator()() {
  try {
    session_->ort().Run(options_, binding_);
  } catch (const Ort::Exception& error) {
    throw failed(session_->graph(), "failed in a step", error);
  }
}

}  // namespace tarflow::detail

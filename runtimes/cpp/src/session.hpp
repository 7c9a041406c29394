// Session: one graph, ready to run. Buffer and BoundRun: memory that a run reads and writes in place.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "log.hpp"
#include "ort.hpp"

namespace tarflow::detail {

using Shape = std::vector<std::int64_t>;

/// What runs the graphs: `ort-cpu`, `ort-cuda`, `ort-tensorrt` or `ort-tensorrt-rtx`, the last from a plugin `library`.
struct Provider {
  std::string name = "ort-cpu";
  std::string library;
  bool on_cpu() const { return name == "ort-cpu"; }
};

/// Throws Error (TARFLOW_ERROR_ENGINE) for an unknown name, or when what it needs is not there.
void check_provider(const Provider& provider);

/// Let the options' sessions run on the provider alone. Throws Error (ENGINE) where ONNX Runtime cannot.
void append_provider(Ort::SessionOptions& options, const Provider& provider);

/// How a session is opened.
struct SessionSettings {
  int threads = 1;       // inside the operators
  bool spinning = true;  // whether threads without work wait actively
  Provider provider;
  const Logger* logger = nullptr;  // must live as long as the session
};

/// A graph on ONNX Runtime; running it is thread-safe. Throws Error (ENGINE) when ONNX Runtime refuses the graph.
class Session {
 public:
  /// The graph in the file `path`.
  static std::shared_ptr<Session> of_file(const std::string& path, const SessionSettings& settings);
  /// A serialised graph whose external data lies in `folder`.
  static std::shared_ptr<Session> of_bytes(const std::string& model, const std::string& folder,
                                           const SessionSettings& settings);

  bool has_input(const std::string& name) const;
  const std::vector<std::string>& inputs() const { return inputs_; }
  const std::vector<std::string>& outputs() const { return outputs_; }
  /// Run on values given in the order of inputs(); new values come out in the order of `names`.
  std::vector<Ort::Value> run(const std::vector<const OrtValue*>& given, const std::vector<std::string>& names);
  Ort::Session& ort() { return session_; }

 private:
  explicit Session(Ort::Session session);
  Ort::Session session_;
  std::vector<std::string> inputs_, outputs_;
};

/// Memory that ONNX Runtime reads and writes in place; zeroed, its first element starts a cache line.
class Buffer {
 public:
  Buffer(Shape shape, ONNXTensorElementDataType type);
  static Buffer floats(Shape shape) { return {std::move(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}; }
  static Buffer integers(Shape shape) { return {std::move(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}; }

  template <typename T>
  T* as() { return reinterpret_cast<T*>(data_); }
  template <typename T>
  const T* as() const { return reinterpret_cast<const T*>(data_); }
  const Ort::Value& value() const { return value_; }
  const Shape& shape() const { return shape_; }
  ONNXTensorElementDataType type() const { return type_; }
  std::size_t bytes() const { return bytes_; }
  /// The first rows of this memory under another shape.
  Ort::Value view(const Shape& shape) const;

 private:
  struct Free {
    void operator()(void* memory) const noexcept { std::free(memory); }
  };
  Shape shape_;
  ONNXTensorElementDataType type_;
  std::size_t bytes_ = 0;
  std::unique_ptr<void, Free> memory_;
  unsigned char* data_ = nullptr;
  Ort::Value value_{nullptr};
};

/// A value over memory of the caller, which is only read.
Ort::Value borrowed(const float* values, const Shape& shape);
Ort::Value borrowed(const std::int64_t* values, const Shape& shape);

/// A session with inputs and outputs bound once to memory that is read and written in place.
class BoundRun {
 public:
  explicit BoundRun(std::shared_ptr<Session> session) : session_(std::move(session)), binding_(session_->ort()) {}
  /// Bind an input that the graph has; others are left out.
  void input(const std::string& name, const Ort::Value& value) {
    if (session_->has_input(name)) binding_.BindInput(name.c_str(), value);
  }
  void output(const std::string& name, const Ort::Value& value) { binding_.BindOutput(name.c_str(), value); }
  /// Run once on what the memory holds now. Throws Error (ENGINE).
  void operator()();

 private:
  std::shared_ptr<Session> session_;
  Ort::IoBinding binding_;
  Ort::RunOptions options_;
};

}  // namespace tarflow::detail

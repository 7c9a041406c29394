// Session: one graph of a bundle on ONNX Runtime. Buffer and BoundRun: memory that a run reads and writes in place.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "log.hpp"
#include "ort.hpp"

namespace tarflow::detail {

using Shape = std::vector<std::int64_t>;

/// A graph on the weights of one block; running it is thread-safe. Nothing comes out of it whose dtype or shape is not
/// what the manifest says: code that reads the results relies on that.
class Session {
 public:
  struct Settings {
    int threads = 1;       // inside the operators
    bool spinning = true;  // whether threads without work wait actively
    const Logger* logger = nullptr;  // must live as long as the session
  };

  /// `graph` must outlive the session; `folder` is the block's. Throws Error (TARFLOW_ERROR_ENGINE) when ONNX Runtime
  /// refuses the graph, or the manifest describes another one.
  Session(const Graph& graph, const std::string& folder, const Settings& settings);

  const Graph& graph() const { return graph_; }
  bool has_input(const std::string& name) const;
  /// Run for `batch` images on an array for each input; returns those of all outputs. Throws Error (ENGINE).
  std::map<std::string, Ort::Value> run(const std::map<std::string, const OrtValue*>& arrays, std::int64_t batch);
  Ort::Session& ort() { return session_; }

 private:
  void check_declared(bool inputs) const;

  const Graph& graph_;
  Ort::Session session_;
};

/// Memory that ONNX Runtime reads and writes in place; zeroed, its first element starts a cache line.
class Buffer {
 public:
  Buffer(Shape shape, ONNXTensorElementDataType type);
  static Buffer floats(Shape shape) { return {std::move(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}; }

  template <typename T>
  T* as() { return reinterpret_cast<T*>(data_); }
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
  /// Run once on what the memory holds now. ONNX Runtime refuses a result that is not of the shape of its memory.
  /// Throws Error (ENGINE).
  void operator()();

 private:
  std::shared_ptr<Session> session_;
  Ort::IoBinding binding_;
  Ort::RunOptions options_;
};

}  // namespace tarflow::detail

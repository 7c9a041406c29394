// The execution providers of ONNX Runtime by name. What was asked for runs every node, or opening is an error: the
// fallback of ONNX Runtime to the CPU is switched off.
#include <algorithm>
#include <mutex>
#include <set>

#include "error.hpp"
#include "session.hpp"

namespace tarflow::detail {
namespace {

constexpr const char* kPlugin = "NvTensorRTRTXExecutionProvider";

std::mutex registering;
std::set<std::string> registered;  // plugin libraries; they stay until the process ends

/// The provider's name in the builds of ONNX Runtime that have it inside, or nullptr.
const char* built_in(const std::string& engine) {
  if (engine == "ort-cuda") return "CUDAExecutionProvider";
  if (engine == "ort-tensorrt") return "TensorrtExecutionProvider";
  return nullptr;
}

#if ORT_API_VERSION >= 22
/// Register the plugin once, and find the devices that it drives.
std::vector<const OrtEpDevice*> plugin_devices(const std::string& library) {
  const std::lock_guard<std::mutex> lock(registering);
  OrtEnv* environment = ort_environment();
  if (registered.count(library) == 0) {
    try {
      Ort::ThrowOnError(
          Ort::GetApi().RegisterExecutionProviderLibrary(environment, library.c_str(), library.c_str()));
    } catch (const Ort::Exception& error) {
      throw engine_error("engine ort-tensorrt-rtx: cannot load " + library + ": " + error.what(),
                         "name the plugin library of the package onnxruntime-ep-nv-tensorrt-rtx");
    }
    registered.insert(library);
  }
  const OrtEpDevice* const* all = nullptr;
  std::size_t count = 0;
  Ort::ThrowOnError(Ort::GetApi().GetEpDevices(environment, &all, &count));
  std::vector<const OrtEpDevice*> found;
  for (std::size_t i = 0; i < count; ++i) {
    if (std::string(Ort::GetApi().EpDevice_EpName(all[i])) == kPlugin) found.push_back(all[i]);
  }
  if (found.empty())
    throw engine_error("engine ort-tensorrt-rtx: " + library + " finds no device of " + kPlugin,
                       "it needs an NVIDIA GPU and its driver");
  found.resize(1);
  return found;
}
#endif

void append_plugin(Ort::SessionOptions& options, const std::string& library) {
#if ORT_API_VERSION >= 22
  const std::vector<const OrtEpDevice*> devices = plugin_devices(library);
  Ort::ThrowOnError(Ort::GetApi().SessionOptionsAppendExecutionProvider_V2(
      options, ort_environment(), devices.data(), devices.size(), nullptr, nullptr, 0));
#else
  static_cast<void>(options);
  throw engine_error("engine ort-tensorrt-rtx: cannot load " + library + ": libtarflow was built with old headers",
                     "build it with the headers of ONNX Runtime 1.22 or newer");
#endif
}

void append_cuda(Ort::SessionOptions& options) {
  OrtCUDAProviderOptionsV2* cuda = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> freed(
      cuda, [](OrtCUDAProviderOptionsV2* one) { Ort::GetApi().ReleaseCUDAProviderOptions(one); });
  options.AppendExecutionProvider_CUDA_V2(*cuda);
}

void append_tensorrt(Ort::SessionOptions& options) {
  OrtTensorRTProviderOptionsV2* tensorrt = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateTensorRTProviderOptions(&tensorrt));
  const std::unique_ptr<OrtTensorRTProviderOptionsV2, void (*)(OrtTensorRTProviderOptionsV2*)> freed(
      tensorrt, [](OrtTensorRTProviderOptionsV2* one) { Ort::GetApi().ReleaseTensorRTProviderOptions(one); });
  options.AppendExecutionProvider_TensorRT_V2(*tensorrt);
}

}  // namespace

void check_provider(const Provider& provider) {
  const std::string& engine = provider.name;
  const bool plugin = engine == "ort-tensorrt-rtx";
  if (!plugin && !provider.on_cpu() && built_in(engine) == nullptr)
    throw engine_error("unknown engine '" + engine + "'",
                       "valid are ort-cpu, ort-cuda, ort-tensorrt, ort-tensorrt-rtx");
  if (plugin && provider.library.empty())
    throw engine_error("engine ort-tensorrt-rtx is a plugin of ONNX Runtime, and its library is not given",
                       "set engine_library to the path of the library of onnxruntime-ep-nv-tensorrt-rtx");
  if (!plugin && !provider.library.empty())
    throw engine_error("engine_library was given, but engine " + engine + " is part of ONNX Runtime",
                       "it is for ort-tensorrt-rtx; ort_library names another ONNX Runtime");
  if (const char* name = built_in(engine)) {
    const std::vector<std::string> offered = Ort::GetAvailableProviders();
    if (std::find(offered.begin(), offered.end(), name) == offered.end())
      throw engine_error("engine " + engine + ": the loaded ONNX Runtime was built without " + name,
                         "name one that has it: ort_library or TARFLOW_ORT_LIBRARY");
  }
#if ORT_API_VERSION >= 22
  if (plugin) plugin_devices(provider.library);
#endif
}

void append_provider(Ort::SessionOptions& options, const Provider& provider) {
  if (provider.on_cpu()) return;
  options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
  if (provider.name == "ort-cuda") append_cuda(options);
  if (provider.name == "ort-tensorrt") append_tensorrt(options);
  if (provider.name == "ort-tensorrt-rtx") append_plugin(options, provider.library);
}

}  // namespace tarflow::detail

#include "ort.hpp"

#include <dlfcn.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unistd.h>
#include <vector>

#include "error.hpp"

namespace tarflow::detail {
namespace {

constexpr int kApiVersion = 21;     // newer headers and libraries only append to it
constexpr int kOldestMinor = 28;   // the oldest that the bundles were run on; opset 24 needs its TensorScatter
static_assert(ORT_API_VERSION >= 21, "headers of ONNX Runtime 1.21 or newer are needed");

std::mutex mutex;
std::string loaded;                // path, once loaded
void* loaded_handle = nullptr;
std::string version;
Ort::Env* environment = nullptr;   // never freed: sessions may live until the process ends

std::string beside(const void* address) {
  Dl_info info = {};
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

std::string program_folder() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  if (length <= 0) return "";
  const std::string whole(path, static_cast<std::size_t>(length));
  return whole.substr(0, whole.rfind('/') + 1);
}

/// An explicitly requested library is used or is an error; no other is tried.
std::vector<std::string> candidates(const std::string& library) {
  if (!library.empty()) return {library};
  const char* variable = std::getenv("TARFLOW_ORT_LIBRARY");
  if (variable != nullptr && *variable != '\0') return {variable};
  std::vector<std::string> found;
  for (const std::string& folder : {beside(reinterpret_cast<const void*>(&ort_version)), program_folder()}) {
    if (!folder.empty()) {
      found.push_back(folder + "libonnxruntime.so.1");
      found.push_back(folder + "libonnxruntime.so");
    }
  }
  found.emplace_back("libonnxruntime.so.1");
  found.emplace_back("libonnxruntime.so");
  return found;
}

/// Messages of ONNX Runtime outside of sessions are also in the status of the call that failed.
void say_nothing(void*, OrtLoggingLevel, const char*, const char*, const char*, const char*) {}

/// Whether a path, however written, is that of the library in use.
bool is_loaded(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (handle != nullptr) dlclose(handle);
  return handle == loaded_handle;
}

void start(void* handle, const std::string& path) {
  const auto base_of = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (base_of == nullptr) throw engine_error(path + " is not ONNX Runtime: it has no OrtGetApiBase");
  const OrtApiBase* base = base_of();
  const std::string found = base->GetVersionString();
  int major = 0;
  int minor = 0;
  if (std::sscanf(found.c_str(), "%d.%d", &major, &minor) != 2 || major != 1 || minor < kOldestMinor)
    throw engine_error("ONNX Runtime " + found + " in " + path + " is not supported",
                       "use ONNX Runtime 1." + std::to_string(kOldestMinor) + " or newer");
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr)
    throw engine_error("ONNX Runtime " + found + " does not offer its API " + std::to_string(kApiVersion));
  Ort::InitApi(api);
  auto made = std::make_unique<Ort::Env>(ORT_LOGGING_LEVEL_ERROR, "tarflow", say_nothing, nullptr);
  // Sessions that each keep an arena of their own would hold three times the memory over the blocks of a model.
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  made->CreateAndRegisterAllocator(memory, nullptr);
  version = found;
  loaded = path;
  loaded_handle = handle;
  environment = made.release();  // last: it says that the library is loaded
}

}  // namespace

void load_ort(const std::string& library, const std::string& user) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (environment != nullptr) {
    if (!library.empty() && !is_loaded(library))
      throw engine_error("ONNX Runtime is loaded from " + loaded + " already, not from " + library,
                         "use one ONNX Runtime per process");
    return;
  }
  std::string reasons;
  for (const std::string& path : candidates(library)) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* reason = dlerror();
      reasons += std::string(reasons.empty() ? "" : "; ") + (reason != nullptr ? reason : path.c_str());
      continue;
    }
    try {
      start(handle, path);
    } catch (const Ort::Exception& error) {
      throw engine_error(std::string("ONNX Runtime does not start: ") + error.what());
    }
    return;
  }
  throw engine_error("ONNX Runtime, which " + user + " needs, is not found: " + reasons,
                     "pip install onnxruntime, and set TARFLOW_ORT_LIBRARY to libonnxruntime.so* in its folder capi; "
                     "sampling on engine native with denoise = 0 needs none");
}

const char* ort_version() {
  const std::lock_guard<std::mutex> lock(mutex);
  return version.empty() ? "" : version.c_str();  // what is handed out must not change when the library is loaded
}

Ort::Env& ort_environment() { return *environment; }

}  // namespace tarflow::detail

// ONNX Runtime, loaded at run time: a linked binary would be tied to one release's symbol version.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <string>

namespace tarflow::detail {

/// Load ONNX Runtime once for the process: `library`, else TARFLOW_ORT_LIBRARY, else beside this library and the
/// program, else where the system's loader looks. Throws Error (TARFLOW_ERROR_ENGINE), which says that `user` needs it.
void load_ort(const std::string& library, const std::string& user);

/// The version in use, "" before load_ort; a static string.
const char* ort_version();

/// The environment of the process, after load_ort.
Ort::Env& ort_environment();

}  // namespace tarflow::detail

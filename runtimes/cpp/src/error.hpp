// One exception type inside the library; the C ABI turns it into a status, a message and a hint.
#pragma once

#include <stdexcept>
#include <string>

#include "tarflow/tarflow.h"

namespace tarflow::detail {

struct Error : std::runtime_error {
  Error(tarflow_status code, const std::string& message, std::string remedy = "")
      : std::runtime_error(message), status(code), hint(std::move(remedy)) {}
  tarflow_status status;
  std::string hint;
};

inline Error input_error(const std::string& message, const std::string& hint = "") {
  return {TARFLOW_ERROR_INPUT, message, hint};
}
inline Error bundle_error(const std::string& message, const std::string& hint) {
  return {TARFLOW_ERROR_BUNDLE, message, hint};
}
inline Error engine_error(const std::string& message, const std::string& hint = "") {
  return {TARFLOW_ERROR_ENGINE, message, hint};
}

}  // namespace tarflow::detail

// Logger: a model's messages. Without a callback they are dropped; nothing ever goes to stdout or stderr.
#pragma once

#include <string>

#include "tarflow/tarflow.h"

namespace tarflow::detail {

struct Logger {
  tarflow_on_log on_log = nullptr;
  void* user_data = nullptr;

  void operator()(tarflow_log_level level, const std::string& text) const {
    if (on_log != nullptr) on_log(level, text.c_str(), user_data);
  }
};

}  // namespace tarflow::detail

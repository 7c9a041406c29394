// What both halves of the C ABI share: the objects behind the handles, and the one place where exceptions become
// statuses.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "engine.hpp"
#include "error.hpp"
#include "worker_pool.hpp"

struct tarflow_model {
  std::shared_ptr<const tarflow::detail::Engine> engine;
};

struct tarflow_sampler {
  std::shared_ptr<const tarflow::detail::Engine> engine;
  tarflow::detail::Call call{};
  // Of the last sample:
  std::int64_t images = 0;
  std::vector<std::int64_t> non_finite{};
};

namespace tarflow::detail {

/// Keep what went wrong for the calling thread; returns `status`.
tarflow_status fail(tarflow_status status, const char* message, const char* hint) noexcept;

/// The status of the exception that is being handled.
tarflow_status status_of_exception() noexcept;

template <typename Work>
tarflow_status guarded(Work work) noexcept {
  try {
    work();
    return TARFLOW_OK;
  } catch (...) {
    return status_of_exception();
  }
}

inline void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw input_error(std::string(name) + " must not be NULL");
}

inline void check_size(std::size_t size, std::size_t known, const char* name) {
  if (size < sizeof(std::size_t) || size > known)
    throw input_error(std::string(name) + ".struct_size is " + std::to_string(size) + ", this library knows " +
                          std::to_string(known),
                      "call the _init function first; a caller built with a newer header needs a newer libtarflow");
}

/// A struct of the caller, of this library's size: fields that the caller's header lacks keep their defaults.
template <typename Struct>
Struct given(const Struct* options, void (*defaults)(Struct*, std::size_t), const char* name) {
  Struct taken;
  defaults(&taken, sizeof taken);
  if (options == nullptr) return taken;
  check_size(options->struct_size, sizeof taken, name);
  std::memcpy(&taken, options, options->struct_size);
  return taken;
}

/// Fill a struct of the caller as far as its header knows it.
template <typename Struct>
void put(Struct filled, Struct* target, const char* name) {
  need(target, name);
  check_size(target->struct_size, sizeof filled, name);
  filled.struct_size = target->struct_size;
  std::memcpy(static_cast<void*>(target), &filled, target->struct_size);
}

template <typename Struct>
void put_defaults(const Struct& defaults, Struct* options, std::size_t size) {
  if (options == nullptr || size < sizeof(std::size_t)) return;
  std::memset(static_cast<void*>(options), 0, size);
  std::memcpy(static_cast<void*>(options), &defaults, std::min(size, sizeof defaults));
  options->struct_size = size;
}

}  // namespace tarflow::detail

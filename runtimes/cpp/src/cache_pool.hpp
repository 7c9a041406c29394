// CachePool: attention caches that one inverse leaves to the next, which saves a page fault every 4 KB of fresh memory.
#pragma once

#include <mutex>
#include <new>
#include <vector>

#include "session.hpp"

namespace tarflow::detail {

/// Provides buffers that hold values of an earlier user, or zeros. Any number of threads may use it.
class CachePool {
 public:
  static constexpr std::size_t kBytes = 64 << 20;  // limit; the buffers returned first are freed first

  /// A buffer of that shape, for exclusive use by the caller.
  Buffer take(const Shape& shape, ONNXTensorElementDataType type) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
        if (kept->shape() != shape || kept->type() != type) continue;
        Buffer taken = std::move(*kept);
        bytes_ -= taken.bytes();
        kept_.erase(kept);
        return taken;
      }
    }
    return {shape, type};
  }
  /// Return an unused cache to the pool; it is freed if there is no memory to record it. Called by destructors.
  void give(Buffer buffer) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t bytes = buffer.bytes();
    try {
      kept_.push_back(std::move(buffer));
    } catch (const std::bad_alloc&) {
      return;
    }
    bytes_ += bytes;
    while (bytes_ > kBytes) {
      bytes_ -= kept_.front().bytes();
      kept_.erase(kept_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Buffer> kept_;
  std::size_t bytes_ = 0;
};

}  // namespace tarflow::detail

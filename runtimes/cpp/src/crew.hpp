// Crew: the parts of a batch side by side in threads, with progress and cancellation in the caller's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tarflow::detail {

/// Set from any thread to end what a sampler is doing.
using CancelFlag = std::atomic<bool>;

/// Throws Error (TARFLOW_ERROR_CANCELLED) when the flag is set.
void check_cancelled(const CancelFlag* cancelled);

/// Runs the parts of a batch in threads; the caller's thread works too, and alone calls `on_step`.
class Crew {
 public:
  using OnStep = std::function<void(std::int64_t steps)>;

  Crew(std::int64_t parts, OnStep on_step, const CancelFlag* cancelled = nullptr)
      : done_(static_cast<std::size_t>(parts)), on_step_(std::move(on_step)), cancelled_(cancelled),
        caller_(std::this_thread::get_id()) {}

  /// Whether the parts are to end: one has failed, or the call was cancelled.
  bool stopped() const { return stop_ || (cancelled_ != nullptr && *cancelled_); }
  /// Say how many steps of a part are done.
  void report(std::int64_t part, std::int64_t steps);
  /// Run every part; the first error stops the others, and is thrown when all threads have ended.
  void work(const std::function<void(std::int64_t part)>& run, std::int64_t workers);

 private:
  void take_parts(const std::function<void(std::int64_t)>& run);
  void tell();

  std::vector<std::atomic<std::int64_t>> done_;
  OnStep on_step_;
  const CancelFlag* cancelled_;
  std::thread::id caller_;
  std::atomic<bool> stop_{false};
  std::atomic<std::int64_t> next_{0};
  std::int64_t told_ = 0;
  std::mutex mutex_;  // of the error
  std::exception_ptr error_;
};

}  // namespace tarflow::detail

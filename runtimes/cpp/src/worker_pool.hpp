// WorkerPool: the parts of a batch side by side in threads, with progress and cancellation in the caller's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tarflow::detail {

/// One call at a time, which any thread, or a signal handler, may cancel. One word holds both, so that a cancellation
/// is of the call that it met, and never of the next.
class Call {
 public:
  /// Whether the call may begin: none is running.
  bool begin() noexcept { return change(kIdle, kRunning); }
  void end() noexcept { __atomic_store_n(&state_, kIdle, __ATOMIC_SEQ_CST); }
  void cancel() noexcept { change(kRunning, kCancelled); }
  bool cancelled() const noexcept { return __atomic_load_n(&state_, __ATOMIC_SEQ_CST) == kCancelled; }
  /// Throws Error (TARFLOW_ERROR_CANCELLED) when the call is to end.
  void check() const;
  /// While a call runs: a word that is 0 until the call is cancelled, to be read atomically.
  const std::int32_t* word() const noexcept { return &state_; }

 private:
  static constexpr std::int32_t kRunning = 0, kCancelled = 1, kIdle = 2;
  bool change(std::int32_t from, std::int32_t to) noexcept {
    return __atomic_compare_exchange_n(&state_, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
  std::int32_t state_ = kIdle;
};

using OnStep = std::function<void(std::int64_t steps)>;

/// Runs the parts of one batch, once, in threads; the caller's thread works too, and alone calls `on_step`.
class WorkerPool {
 public:
  WorkerPool(std::int64_t parts, OnStep on_step, const Call* call = nullptr)
      : done_(static_cast<std::size_t>(parts)), on_step_(std::move(on_step)), call_(call),
        caller_(std::this_thread::get_id()) {}

  /// Whether the parts are to end: one has failed, or the call was cancelled.
  bool stopped() const { return stop_ || (call_ != nullptr && call_->cancelled()); }
  /// Say how many steps of a part are done.
  void report(std::int64_t part, std::int64_t steps);
  /// Run every part; the first error stops the others, and is thrown when all threads have ended.
  void run(const std::function<void(std::int64_t part)>& work, std::int64_t threads);

 private:
  void take_parts(const std::function<void(std::int64_t)>& work);
  void notify();

  std::vector<std::atomic<std::int64_t>> done_;
  OnStep on_step_;
  const Call* call_;
  std::thread::id caller_;
  std::atomic<bool> stop_{false};
  std::atomic<std::int64_t> next_{0};
  std::int64_t notified_ = 0;  // steps that `on_step` was last called with
  std::mutex mutex_;           // of the error
  std::exception_ptr error_;
};

}  // namespace tarflow::detail

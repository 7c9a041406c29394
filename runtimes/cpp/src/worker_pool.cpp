#include "worker_pool.hpp"

#include "error.hpp"

namespace tarflow::detail {

void Call::check() const {
  if (cancelled()) throw Error(TARFLOW_ERROR_CANCELLED, "cancelled by tarflow_sampler_cancel");
}

void WorkerPool::report(std::int64_t part, std::int64_t steps) {
  done_[static_cast<std::size_t>(part)] = steps;
  if (on_step_ && std::this_thread::get_id() == caller_) notify();
}

/// Calls on_step with the mean progress of the parts, when that has grown by a whole step.
void WorkerPool::notify() {
  std::int64_t sum = 0;
  for (const auto& part : done_) sum += part;
  const std::int64_t done = sum / static_cast<std::int64_t>(done_.size());
  if (done <= notified_) return;
  notified_ = done;
  on_step_(done);
}

void WorkerPool::take_parts(const std::function<void(std::int64_t)>& work) {
  try {
    while (!stopped()) {
      const std::int64_t part = next_++;
      if (part >= static_cast<std::int64_t>(done_.size())) return;
      work(part);
    }
  } catch (...) {
    stop_ = true;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void WorkerPool::run(const std::function<void(std::int64_t)>& work, std::int64_t threads) {
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t i = 1; i < threads; ++i) helpers.emplace_back([&] { take_parts(work); });
  } catch (...) {  // no further thread: those that started do the work
  }
  take_parts(work);
  for (std::thread& helper : helpers) helper.join();
  if (error_) std::rethrow_exception(error_);
  if (call_ != nullptr) call_->check();
  if (on_step_) notify();
}

}  // namespace tarflow::detail

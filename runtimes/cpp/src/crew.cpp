#include "crew.hpp"

#include "error.hpp"

namespace tarflow::detail {

void Call::check() const {
  if (cancelled()) throw Error(TARFLOW_ERROR_CANCELLED, "cancelled by tarflow_sampler_cancel");
}

void Crew::report(std::int64_t part, std::int64_t steps) {
  done_[static_cast<std::size_t>(part)] = steps;
  if (on_step_ && std::this_thread::get_id() == caller_) tell();
}

/// The mean progress of the parts, when it has grown by a whole step.
void Crew::tell() {
  std::int64_t sum = 0;
  for (const auto& part : done_) sum += part;
  const std::int64_t done = sum / static_cast<std::int64_t>(done_.size());
  if (done <= told_) return;
  told_ = done;
  on_step_(done);
}

void Crew::take_parts(const std::function<void(std::int64_t)>& run) {
  try {
    while (!stopped()) {
      const std::int64_t part = next_++;
      if (part >= static_cast<std::int64_t>(done_.size())) return;
      run(part);
    }
  } catch (...) {
    stop_ = true;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void Crew::work(const std::function<void(std::int64_t)>& run, std::int64_t workers) {
  std::vector<std::thread> threads;
  try {
    for (std::int64_t i = 1; i < workers; ++i) threads.emplace_back([&] { take_parts(run); });
  } catch (...) {  // no further thread: those that started do the work
  }
  take_parts(run);
  for (std::thread& thread : threads) thread.join();
  if (error_) std::rethrow_exception(error_);
  if (call_ != nullptr) call_->check();
  if (on_step_) tell();
}

}  // namespace tarflow::detail

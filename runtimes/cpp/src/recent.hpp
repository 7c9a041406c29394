// Recent: what is kept of things that are costly to make, those that were used last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace tarflow::detail {

/// Any number of threads may use it; what one of them holds lives on when it is kept no longer.
template <typename Key, typename Value>
class Recent {
 public:
  explicit Recent(std::int64_t most) : most_(std::max<std::int64_t>(1, most)) {}

  /// The value of that key, of `make`() where there is none; when there are too many, the one used longest ago goes
  /// before that.
  template <typename Make>
  std::shared_ptr<Value> get(const Key& key, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto place = std::find_if(kept_.begin(), kept_.end(), [&](const auto& one) { return one.first == key; });
    if (place == kept_.end()) {
      if (static_cast<std::int64_t>(kept_.size()) == most_) kept_.pop_front();
      place = kept_.emplace(kept_.end(), key, make());
    }
    kept_.splice(kept_.end(), kept_, place);
    return kept_.back().second;
  }

 private:
  std::int64_t most_;
  std::mutex mutex_;
  std::list<std::pair<Key, std::shared_ptr<Value>>> kept_;  // the one used last stands last
};

}  // namespace tarflow::detail

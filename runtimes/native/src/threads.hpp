/// Threads for one call. None is kept: starting one takes some 20 us, a block's inverse milliseconds.
#pragma once

#include "../core/layout.hpp"

#if !defined(TARFLOW_NATIVE_NO_THREADS)
#include <chrono>
#include <thread>
#endif

namespace tarflow_native {

#if defined(TARFLOW_NATIVE_NO_THREADS)
constexpr i64 MOST_THREADS = 1;
#else
constexpr i64 MOST_THREADS = 256;
#endif

/// Calls `work`(0) .. `work`(threads - 1) side by side, the first one here. Where the system refuses a thread there are
/// fewer: what they would have taken is left for the others.
template <class Work>
void side_by_side([[maybe_unused]] i64 threads, const Work &work) {
#if !defined(TARFLOW_NATIVE_NO_THREADS)
  std::thread others[MOST_THREADS];
  i64 started = 0;
  try {
    for (; started < threads - 1; ++started) others[started] = std::thread(work, started + 1);
  } catch (...) {
  }
  work(0);
  for (i64 i = 0; i < started; ++i) others[i].join();
#else
  work(0);
#endif
}

/// Lets the system run another thread.
inline void yield() {
#if !defined(TARFLOW_NATIVE_NO_THREADS)
  std::this_thread::yield();
#endif
}

/// Microseconds since some time.
inline i64 now() {
#if defined(TARFLOW_NATIVE_NO_THREADS)
  return 0;
#else
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(time).count();
#endif
}

/// Whether threads may share columns: not for a while after one had to be waited for, since others then want its
/// processor. The while doubles from 50 ms to 1.6 s as long as that goes on. This is all that outlives a call; it has no
/// influence on results.
class Crowd {
public:
  bool is_near() const { return now() < __atomic_load_n(&until_, __ATOMIC_RELAXED); }

  void saw(bool is_late) {
    const i64 before = __atomic_load_n(&pause_, __ATOMIC_RELAXED);
    const i64 next = is_late ? smaller(LONGEST, larger(SHORTEST, 2 * before)) : 0;
    __atomic_store_n(&pause_, next, __ATOMIC_RELAXED);
    if (is_late) __atomic_store_n(&until_, now() + next, __ATOMIC_RELAXED);
  }

private:
  static constexpr i64 SHORTEST = 50'000, LONGEST = 1'600'000; // microseconds
  i64 until_ = 0, pause_ = 0;
};

} // namespace tarflow_native

/// Threads for one call. None is kept: starting one takes some 20 us, a block's inverse milliseconds.
#pragma once

#include "../core/layout.hpp"

#if !defined(TARFLOW_NATIVE_NO_THREADS)
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

/// Lets other threads run before this one looks again whether another has finished.
inline void give_way() {
#if !defined(TARFLOW_NATIVE_NO_THREADS)
  std::this_thread::yield();
#endif
}

} // namespace tarflow_native

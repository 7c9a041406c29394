/// Threads for one call. None is kept: starting one takes some 20 us, a block's inverse milliseconds.
#pragma once

#include "../core/layout.hpp"

#if !defined(TARFLOW_NATIVE_NO_THREADS)
#include <chrono>
#include <thread>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#endif

namespace tarflow_native {

#if defined(TARFLOW_NATIVE_NO_THREADS)
constexpr i64 MOST_THREADS = 1;
#else
constexpr i64 MOST_THREADS = 256;
#endif

#if defined(TARFLOW_NATIVE_NO_THREADS)
#elif defined(__GLIBC__)
/// A thread that starts on another processor than its creator's. The system often places it on the same one and moves
/// it only after milliseconds, which is longer than a block of a small model takes.
template <class Work>
class Thread {
public:
  bool start(const Work &work, i64 number) {
    work_ = &work;
    number_ = number;
    pthread_attr_t attributes;
    cpu_set_t others;
    if (pthread_attr_init(&attributes) != 0) return false;
    if (sched_getaffinity(0, sizeof others, &others) == 0 && CPU_COUNT(&others) > 1) {
      CPU_CLR(static_cast<size_t>(sched_getcpu()), &others);
      pthread_attr_setaffinity_np(&attributes, sizeof others, &others);
    }
    const bool is_started = pthread_create(&thread_, &attributes, run, this) == 0;
    pthread_attr_destroy(&attributes);
    return is_started;
  }
  void join() { pthread_join(thread_, nullptr); }

private:
  static void *run(void *given) {
    const Thread &self = *static_cast<Thread *>(given);
    (*self.work_)(self.number_);
    return nullptr;
  }

  const Work *work_ = nullptr;
  i64 number_ = 0;
  pthread_t thread_{};
};
#else
template <class Work>
class Thread {
public:
  bool start(const Work &work, i64 number) {
    try {
      thread_ = std::thread(work, number);
    } catch (...) {
      return false;
    }
    return true;
  }
  void join() { thread_.join(); }

private:
  std::thread thread_;
};
#endif

/// Calls `work`(0) .. `work`(threads - 1) side by side, the first one here. Where the system refuses a thread there are
/// fewer: what they would have taken is left for the others.
template <class Work>
void side_by_side([[maybe_unused]] i64 threads, const Work &work) {
#if !defined(TARFLOW_NATIVE_NO_THREADS)
  Thread<Work> others[MOST_THREADS];
  i64 started = 0;
  while (started < threads - 1 && others[started].start(work, started + 1)) ++started;
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
/// processor. The while doubles from 50 ms to 1.6 s as long as that goes on. This is all that outlives a call;
/// it has no influence on results.
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

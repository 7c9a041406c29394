/// Threads that share the columns of one group of images: a leader, and members that help it.
///
/// The work is a sequence of phases, each cut into one part per thread. A part belongs to the thread that takes it first:
/// a member takes its own as soon as the phase opens, and the leader takes what nobody has begun when it has finished its
/// own. A member that the system does not run therefore costs nothing, unless it is interrupted in the middle of a part:
/// then the leader waits for it, and goes on alone if that takes too long.
///
///     leader                                      member t
///     opened = p - 1                              wait for opened >= p - 1
///     part 0                                      taken[t]: p - 1 -> p ?  part t;  done[t] = p
///     each t: taken[t]: p - 1 -> p ?  part t
///             else wait for done[t] = p
///
/// Which thread computes an output does not change its bits.
#pragma once

#include "layout.hpp"

namespace tarflow_native {

constexpr i64 MOST_MEMBERS = 8;

/// Pauses of a waiting thread before it lets the system run another: some 50 us.
constexpr i64 PAUSES = 4096;

/// Microseconds that a leader waits in a call before it goes on alone, if they are also a fifth of the call so far.
constexpr i64 PATIENCE = 500, PATIENCE_SHARE = 5;

/// What the threads of a team see; zeros at first, but for `opened`, which is -1, and the first three.
struct Team {
  i64 members;     ///< the leader included
  void (*yield)(); ///< lets the system run another thread
  i64 (*now)();    ///< microseconds
  alignas(64) i64 opened;
  alignas(64) int32_t ended;
  i64 began, waited; ///< when the leader began, and how long it has waited for others: microseconds
  struct alignas(64) Member {
    i64 taken, done;
  } member[MOST_MEMBERS];
};

/// Part `index` of `count` equal ones.
struct Part {
  i64 index, count;
  i64 first(i64 units) const { return units * index / count; }
  i64 last(i64 units) const { return units * (index + 1) / count; }
};

/// One thread of a team. Without a team it does everything.
struct Member {
  Team *team;
  i64 index; ///< 0 is the leader
  i64 phase;

  bool is_leader() const { return index == 0; }
};

/// How many threads may share a group's columns: heads and panels are given out whole.
static inline i64 most_members(const Shape &shape) {
  const bool is_large = shape.width >= 2 * PANEL;
  return is_large && shape.head_dim % PANEL == 0 ? smaller(MOST_MEMBERS, heads(shape)) : 1;
}

/// Whether the leader has waited too much for what it has done.
static inline bool is_crowded(const Team &team) {
  return team.waited > PATIENCE && team.waited * PATIENCE_SHARE > team.now() - team.began;
}

#if defined(TARFLOW_NATIVE_TARGET)
namespace TARFLOW_NATIVE_TARGET {

static inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits until `*number` >= `least`, or `*ended` (unless null) is set. Microseconds, if it was long.
static i64 wait_for(const i64 *number, i64 least, const int32_t *ended, const Team &team) {
  const auto is_there = [&] {
    return __atomic_load_n(number, __ATOMIC_ACQUIRE) >= least || (ended && __atomic_load_n(ended, __ATOMIC_RELAXED));
  };
  for (i64 i = 0; i < PAUSES; ++i) {
    if (is_there()) return 0;
    pause();
  }
  const i64 start = team.now();
  while (!is_there()) team.yield();
  return team.now() - start;
}

static bool take_part(Team &team, i64 index, i64 phase) {
  i64 before = phase - 1;
  return __atomic_compare_exchange_n(&team.member[index].taken, &before, phase, false, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED);
}

/// The next phase: `work`(part) for all of its parts, by whoever takes them.
template <class Work>
static void next_phase(Member &me, const Work &work) {
  if (!me.team) return work(Part{0, 1});
  Team &team = *me.team;
  const i64 phase = ++me.phase, count = team.members;
  if (!me.is_leader()) {
    wait_for(&team.opened, phase - 1, &team.ended, team);
    if (__atomic_load_n(&team.opened, __ATOMIC_ACQUIRE) < phase - 1 || !take_part(team, me.index, phase)) return;
    work(Part{me.index, count});
    __atomic_store_n(&team.member[me.index].done, phase, __ATOMIC_RELEASE);
    return;
  }
  __atomic_store_n(&team.opened, phase - 1, __ATOMIC_RELEASE);
  work(Part{0, count});
  for (i64 other = 1; other < count; ++other) {
    if (take_part(team, other, phase))
      work(Part{other, count});
    else
      team.waited += wait_for(&team.member[other].done, phase, nullptr, team);
  }
  if (!is_crowded(team)) return;
  __atomic_store_n(&team.ended, 1, __ATOMIC_RELAXED);
  me.team = nullptr;
}

/// Whether the leader has ended the work of this member.
static inline bool is_dismissed(const Member &me) {
  return !me.is_leader() && __atomic_load_n(&me.team->ended, __ATOMIC_RELAXED);
}

} // namespace TARFLOW_NATIVE_TARGET
#endif
} // namespace tarflow_native

#include "cpus.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>

namespace tarflow::detail {
namespace {

/// CPUs that the control group grants (version 2, then 1), or 0 without a limit.
double quota_of(const std::string& cgroup) {
  double limit = 0.0;
  double period = 0.0;
  std::ifstream unified(cgroup + "/cpu.max");
  if (unified) {
    if (!(unified >> limit >> period)) return 0.0;  // "max": no limit
  } else {
    std::ifstream quota(cgroup + "/cpu/cpu.cfs_quota_us"), length(cgroup + "/cpu/cpu.cfs_period_us");
    if (!(quota >> limit) || !(length >> period)) return 0.0;
  }
  return limit > 0.0 && period > 0.0 ? limit / period : 0.0;
}

}  // namespace

int usable_cpus(const std::string& cgroup) {
  cpu_set_t set;
  const int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                               : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const double quota = quota_of(cgroup);
  return std::max(1, quota > 0.0 ? static_cast<int>(std::min<double>(cpus, std::ceil(quota))) : cpus);
}

}  // namespace tarflow::detail

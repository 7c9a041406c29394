#include "cpus.hpp"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>

namespace tarflow::detail {
namespace {

std::string trimmed(const std::string& text) {
  const char* blanks = " \t\r\n";
  const std::size_t first = text.find_first_not_of(blanks);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

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

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0 && line.find(':') != std::string::npos)
      return trimmed(line.substr(line.find(':') + 1));
  }
  utsname system = {};
  return uname(&system) == 0 ? system.machine : "";
}

}  // namespace tarflow::detail

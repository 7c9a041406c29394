// How many processors this process may use: containers and schedulers make them fewer.
#pragma once

#include <string>

namespace tarflow::detail {

/// The CPUs of the affinity mask, cut to the quota of the control group; at least 1.
int usable_cpus(const std::string& cgroup = "/sys/fs/cgroup");

}  // namespace tarflow::detail

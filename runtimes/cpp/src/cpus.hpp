// How many processors this process may use (containers and schedulers make them fewer), and what they are called.
#pragma once

#include <string>

namespace tarflow::detail {

/// The CPUs of the affinity mask, cut to the quota of the control group; at least 1.
int usable_cpus(const std::string& cgroup = "/sys/fs/cgroup");

/// The processor's name as the system gives it, or its architecture.
std::string cpu_name();

}  // namespace tarflow::detail

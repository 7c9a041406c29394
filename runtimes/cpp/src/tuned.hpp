// Which plan was fastest for which batch, as `tarflow tune` wrote it into NAME.plans.json beside the bundle.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "engine.hpp"
#include "plan.hpp"

namespace tarflow::detail {

/// One entry: for batches up to `batch`, unguided (1) or guided (2).
struct TunedPlan {
  std::map<std::string, std::string> identity;
  std::int64_t batch = 0, branches = 0;
  Plan plan;
};

/// What a tuned plan holds for: digest of the bundle, engine, device and versions.
std::map<std::string, std::string> identity_of(const Engine& engine);

/// Entries for one identity; `reason` says why there are none, if so.
struct TunedPlans {
  std::vector<TunedPlan> entries;
  std::string reason;

  /// The plan of the smallest tuned batch which is not smaller; empty where there is none, which is sequential.
  Plan plan(std::int64_t images, std::int64_t branches, std::int64_t blocks) const;
};

/// The entries of the file `path`, or where that is empty of the one beside the bundle. Throws Error (INPUT) when it is
/// damaged; a file that is not there has no entries.
TunedPlans read_plans(const std::string& path, const Engine& engine);

}  // namespace tarflow::detail

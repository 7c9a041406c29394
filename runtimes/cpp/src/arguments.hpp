// Checks of what callers pass: labels, numbers and arrays become what the sampler needs, or one clear error.
#pragma once

#include <cstdint>

#include "bundle.hpp"
#include "decode.hpp"
#include "tarflow/tarflow.h"

namespace tarflow::detail {

void check_count(std::int64_t n);
void check_first_index(std::uint64_t first_index, std::int64_t n);
/// A finite number >= 0, or > 0 when `positive`.
void check_real(const char* name, double value, bool positive);
void check_finite(const char* name, const float* values, std::int64_t count);

/// Labels of n images [n], the null class written as `classes`; empty for models without classes.
Labels class_numbers(const std::int64_t* labels, std::int64_t n, const Config& config);

/// The guidance that the options describe.
Guidance guidance_of(const tarflow_sample_options& options, const Labels& labels, const Config& config);

/// Sigma of the training noise; an error that ends with `remedy` when it is not known.
double sigma_of(const Config& config, const char* remedy);

}  // namespace tarflow::detail

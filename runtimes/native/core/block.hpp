/// What a kernel is given and what it offers: the sequential inverse of one block for a group of images.
#pragma once

#include "layout.hpp"

namespace tarflow_native {

struct Team;

/// Some images of a batch, and where their inputs begin.
struct Images {
  const Shape *shape;
  const Layout *layout;
  const unsigned char *packed;
  unsigned char *workspace; ///< workspace_of(*shape, branches * count, members).bytes
  Team *team;               ///< null, or who shares the work
  i64 count, branches, steps;
  i64 batch;                        ///< from the labels of one branch to those of the next
  const float *noise;               ///< [count, N, D]
  float *x;                         ///< [count, N, D], may be `noise`
  const i64 *labels;                ///< [G, batch] of which `count` are read; null without classes
  const float *guidance;            ///< [count, 2, N]; null where G is 1
  const float *inverse_temperature; ///< [G, batch] of which `count` are read; null for 1
  const int32_t *cancel;       ///< null, or not 0 when the inverse is to end
  i64 *progress;                    ///< null, or grows by one for each image and step
};

struct Kernel {
  const char *name;
  /// The part of one thread; `member` is 0 for the leader, and without a team. Whether the leader ran to its end.
  bool (*invert)(const Images &images, i64 member);
};

extern const Kernel X86_64_V4_VNNI, X86_64_V4, X86_64_V3, AARCH64, PORTABLE;

} // namespace tarflow_native

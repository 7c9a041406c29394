/// What a kernel is given and what it offers: both directions of one block for a group of images.
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

/// Some images of a batch on their way to noise. Several threads may take them together.
struct Pass {
  const Shape *shape;
  const Layout *layout;
  const unsigned char *packed;
  PassSpace space;
  unsigned char *shared;  ///< space.shared_bytes, of all threads that take these images; `state` is zero at first
  unsigned char *own;     ///< space.own_bytes, of this thread
  void (*wait)();         ///< called repeatedly while another thread has to finish something
  i64 count;
  const float *x;         ///< [count, N, D]
  float *z;               ///< [count, N, D]
  double *log_det;        ///< [count]
  const i64 *labels;      ///< [count]; null without classes
  const int32_t *cancel;  ///< null, or not 0 when the pass is to end
  i64 *progress;          ///< null, or grows by one for each image and patch after the first
};

struct Kernel {
  const char *name;
  /// The part of one thread; `member` is 0 for the leader, and without a team. Whether the leader ran to its end.
  bool (*invert)(const Images &images, i64 member);
  /// Whether it ran to its end, as far as this thread had a part in it.
  bool (*forward)(const Pass &pass);
};

extern const Kernel X86_64_V4_VNNI, X86_64_V4, X86_64_V3, AARCH64, PORTABLE;

} // namespace tarflow_native

/// Products with the weights: y = x W^T + b of some rows, for panels as drawn in layout.hpp.
///
///     y[r][n] = b[n] + sum_k x[r][k] W[n][k]
///
/// Each output is summed in a fixed order, independent of its tile: over groups of 64 k, and in each group by a
/// chain of fused multiply-adds. (One chain over all k would be twice as far from float64.) In plain loops:
///
///     for each row r, output n:
///       s = b[n]
///       for each group of 64 k:
///         t = 0;  for k in the group:  t = fma(x[r][k], W[n][k], t)
///         s = s + t;  int8, where W holds integers:  s = fma(t, scale[n][k / 128], s)
///       y[r][n] = s, or y[r][n] + s
///
/// A tile of ROWS rows and VECTORS vectors of 16 outputs stays in registers over a group: many rows take one panel, one
/// or two rows several, so that enough chains run side by side to hide the latency of a multiply-add.
#pragma once

#include "simd.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

/// Rows of the tallest tile, and vectors of a tile by its rows; both by how many vectors the registers hold.
constexpr int TALLEST = HELD == 32 ? 8 : HELD == 8 ? 6 : 3;
constexpr int vectors_of(int rows) {
  if (HELD == 32) return rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
  if (HELD == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}
static_assert(vectors_of(1) * LANES <= SUMS_STRIDE);

/// x [count, inputs] and y [count, outputs]; a row of y is written up to a whole panel.
struct Rows {
  const float *x;
  i64 x_stride;
  float *y;
  i64 y_stride;
  i64 count;
  bool add; ///< y += instead of y =
};

// How a tile reads weight vector v of input k, where k is even or odd. `base` is where the first of its panels begins,
// `stride` leads to the next one.

struct Float32Panels {
  const float *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Float32Panels &p, i64 k, int, int v) {
    return load(p.base + v / 2 * p.stride + k * PANEL + v % 2 * LANES);
  }
};

struct Bfloat16Panels {
  const uint32_t *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Bfloat16Panels &p, i64 k, int, int v) {
    const Ints word = load(p.base + v / 2 * p.stride + k * LANES);
    return as_floats(v % 2 == 0 ? shift_left(word, 16) : bits_and(word, -65536));
  }
};

struct Int8Panels {
  const uint32_t *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Int8Panels &p, i64 k, int odd, int v) {
    const Ints word = load(p.base + v / 2 * p.stride + k / 2 * LANES);
    return to_floats(shift_right(shift_left(word, 24 - 8 * (2 * odd + v % 2)), 24));
  }
};

/// A product for the panels that are computed together.
struct Job {
  Rows rows; ///< y begins at the first of these outputs
  i64 inputs;
  const float *bias;
  const float *scales; ///< int8: [panels][groups of 128][32]; else null
  i64 scale_stride;    ///< from one panel's scales to the next one's
  float *sums;         ///< [rows][SUMS_STRIDE], s above between groups
};

TARFLOW_NATIVE_INLINE const float *scales_of(const Job &job, i64 vector, i64 k) {
  return job.scales + vector / 2 * job.scale_stride + k / SCALE_GROUP * PANEL + vector % 2 * LANES;
}

/// s = s + t of a tile: the bias at first, y at last, in between `sums`. `group` is the first input of t.
template <int ROWS, int VECTORS>
TARFLOW_NATIVE_INLINE void end_group(const Job &job, i64 row, i64 first, i64 group, bool is_last,
                                     Floats (&sum)[ROWS][VECTORS]) {
  const Rows &rows = job.rows;
  float *kept = job.sums + row * SUMS_STRIDE + first * LANES, *y = rows.y + row * rows.y_stride + first * LANES;
  const float *from = group == 0 ? job.bias + first * LANES : kept;
  float *to = is_last ? y : kept;
  const i64 from_stride = group == 0 ? 0 : SUMS_STRIDE, to_stride = is_last ? rows.y_stride : SUMS_STRIDE;
  for (int v = 0; v < VECTORS; ++v) {
    const Floats scale = job.scales ? load(scales_of(job, first + v, group)) : broadcast(1.0F); // s + 1 t is s + t
    for (int r = 0; r < ROWS; ++r) sum[r][v] = fma(sum[r][v], scale, load(from + r * from_stride + v * LANES));
  }
  if (is_last && rows.add)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = load(y + r * rows.y_stride + v * LANES) + sum[r][v];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(to + r * to_stride + v * LANES, sum[r][v]);
}

/// Rows row .. row + ROWS - 1, vectors first .. first + VECTORS - 1. A single vector is the first of its panel, or the
/// SECOND.
template <int ROWS, int VECTORS, int SECOND, class Panels>
TARFLOW_NATIVE_INLINE void tile(const Job &job, const Panels &panels, i64 row, i64 first) {
  const Rows &rows = job.rows;
  const Panels here{panels.base + first / 2 * panels.stride, panels.stride};
  const float *x = rows.x + row * rows.x_stride;
  for (i64 group = 0; group < job.inputs; group += CHAIN) {
    const i64 group_end = smaller(group + CHAIN, job.inputs);
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = broadcast(0.0F);
    const auto add_products = [&](i64 k, int odd) __attribute__((always_inline)) {
      Floats weight[VECTORS];
      for (int v = 0; v < VECTORS; ++v) weight[v] = Panels::read(here, k, odd, v + SECOND);
      for (int r = 0; r < ROWS; ++r) {
        const Floats input = broadcast(x[r * rows.x_stride + k]);
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(input, weight[v], sum[r][v]);
      }
    };
    i64 k = group;
#pragma GCC unroll 2
    for (; k + 1 < group_end; k += 2) {
      add_products(k, 0);
      add_products(k + 1, 1);
    }
    if (k < group_end) add_products(k, 0);
    end_group<ROWS, VECTORS>(job, row, first, group, group_end == job.inputs, sum);
  }
}

/// ROWS rows of all vectors first .. last - 1, an even number, in tiles as wide as fit.
template <int ROWS, int VECTORS, class Panels>
static void strip(const Job &job, const Panels &panels, i64 row, i64 first, i64 last) {
  if constexpr (VECTORS == 1) {
    for (; first < last; first += 2) {
      tile<ROWS, 1, 0>(job, panels, row, first);
      tile<ROWS, 1, 1>(job, panels, row, first + 1);
    }
  } else {
    for (; first + VECTORS <= last; first += VECTORS) tile<ROWS, VECTORS, 0>(job, panels, row, first);
    if constexpr (VECTORS > 2) strip<ROWS, VECTORS / 2>(job, panels, row, first, last);
  }
}

/// The strip of `rows` <= ROWS rows.
template <int ROWS, class Panels>
static void strip_of(i64 rows, const Job &job, const Panels &panels, i64 row, i64 vectors) {
  if (rows == ROWS) return strip<ROWS, vectors_of(ROWS)>(job, panels, row, 0, vectors);
  if constexpr (ROWS > 1) strip_of<ROWS - 1>(rows, job, panels, row, vectors);
}

/// All rows, in as few tiles as possible, all but the last of the same height.
template <class Panels>
static void all_rows(const Job &job, const Panels &panels, i64 vectors) {
  const i64 count = job.rows.count, tiles = (count + TALLEST - 1) / TALLEST, height = (count + tiles - 1) / tiles;
  for (i64 row = 0; row < count; row += height)
    strip_of<TALLEST>(smaller(height, count - row), job, panels, row, vectors);
}

/// The product with a linear layer; offsets count from `packed`, `sums` is [rows][SUMS_STRIDE].
static void product(const Linear &linear, const unsigned char *packed, const Rows &rows, float *sums) {
  const i64 panels = round_up(linear.outputs, PANEL) / PANEL, bytes = panel_bytes(linear.format, linear.inputs);
  const i64 scale_stride = round_up(linear.inputs, SCALE_GROUP) / SCALE_GROUP * PANEL;
  // Panels that are computed together: as many as the tiles are wide.
  const i64 together = larger(1, vectors_of(static_cast<int>(smaller(rows.count, TALLEST))) / 2);
  for (i64 panel = 0; panel < panels; panel += together) {
    const i64 vectors = 2 * smaller(together, panels - panel);
    const unsigned char *base = packed + linear.panels + panel * bytes;
    const auto *words = reinterpret_cast<const uint32_t *>(base);
    Job job{rows, linear.inputs, reinterpret_cast<const float *>(packed + linear.bias) + panel * PANEL, nullptr,
            scale_stride, sums};
    job.rows.y += panel * PANEL;
    if (linear.format == Format::int8)
      job.scales = reinterpret_cast<const float *>(packed + linear.scales) + panel * scale_stride;
    if (linear.format == Format::float32)
      all_rows(job, Float32Panels{reinterpret_cast<const float *>(base), bytes / 4}, vectors);
    else if (linear.format == Format::bfloat16)
      all_rows(job, Bfloat16Panels{words, bytes / 4}, vectors);
    else
      all_rows(job, Int8Panels{words, bytes / 4}, vectors);
  }
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

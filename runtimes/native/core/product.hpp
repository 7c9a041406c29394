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
///         s = s + t
///       y[r][n] = s, or y[r][n] + s
///
/// With int8 weights W = q scale, inputs are rounded to int8 too, each group of 128 by its largest, so that a sum is one of
/// integers, which is exact however it is computed:
///
///         u = max |x[r][k]| / 127 of the group;  p[k] = round(x[r][k] / u)
///         t = sum_k p[k] q[n][k];  s = fma(t, u scale[n], s)
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

// How a tile reads weight vector v of input k, the first, second .. of those read together. `base` is where the first of
// its panels begins,
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

/// Bytes q + 128, as integers of 32 bits that are floats or, with HAS_DOT, as they lie.
struct Int8Panels {
  const uint32_t *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Int8Panels &p, i64 k, int byte, int v) {
    return to_floats(bits_and(shift_right(words(p, k, v), 8 * byte), 255));
  }
  TARFLOW_NATIVE_INLINE Ints words(const Int8Panels &p, i64 k, int v) {
    return load(p.base + v / 2 * p.stride + k / 4 * PANEL + v % 2 * LANES);
  }
};

template <class Panels>
constexpr bool IS_INT8 = false;
template <>
constexpr bool IS_INT8<Int8Panels> = true;

/// Inputs whose products are one chain, and how many are read together.
template <class Panels>
constexpr i64 GROUP = IS_INT8<Panels> ? SCALE_GROUP : CHAIN;
template <class Panels>
constexpr i64 TOGETHER = IS_INT8<Panels> ? 4 : 2;

/// Rows rounded to int8, of `stride` floats or 4 * `stride` bytes.
struct Integers {
  const float *values;
  const int8_t *bytes;
  i64 stride;
  i64 groups;            ///< of a row
  const float *units;    ///< u [rows][groups]
  const int32_t *starts; ///< [rows][groups]: -128 sum of p, which undoes the 128 of the weights; where the sums begin
};

/// A product for the panels that are computed together.
struct Job {
  Rows rows; ///< y begins at the first of these outputs
  Integers integers; ///< int8: the inputs
  i64 inputs;
  const float *bias;
  const float *scales; ///< int8: [panels][groups of 128][32]; else null
  i64 scale_stride;    ///< from one panel's scales to the next one's
  float *sums;         ///< [rows][SUMS_STRIDE], s above between groups
};

TARFLOW_NATIVE_INLINE const float *scales_of(const Job &job, i64 vector, i64 k) {
  return job.scales + vector / 2 * job.scale_stride + k / SCALE_GROUP * PANEL + vector % 2 * LANES;
}

TARFLOW_NATIVE_INLINE const float *unit_of(const Job &job, i64 row, i64 k) {
  return job.integers.units + row * job.integers.groups + k / SCALE_GROUP;
}
TARFLOW_NATIVE_INLINE const int32_t *start_of(const Job &job, i64 row, i64 k) {
  return job.integers.starts + row * job.integers.groups + k / SCALE_GROUP;
}

/// s = s + t of a tile: the bias at first, y at last, in between `sums`. `group` is the first input of t.
template <class Panels, int ROWS, int VECTORS>
TARFLOW_NATIVE_INLINE void end_group(const Job &job, i64 row, i64 first, i64 group, bool is_last,
                                     Floats (&sum)[ROWS][VECTORS]) {
  const Rows &rows = job.rows;
  float *kept = job.sums + row * SUMS_STRIDE + first * LANES, *y = rows.y + row * rows.y_stride + first * LANES;
  const float *from = group == 0 ? job.bias + first * LANES : kept;
  float *to = is_last ? y : kept;
  const i64 from_stride = group == 0 ? 0 : SUMS_STRIDE, to_stride = is_last ? rows.y_stride : SUMS_STRIDE;
  for (int v = 0; v < VECTORS; ++v) {
    for (int r = 0; r < ROWS; ++r) {
      const Floats before = load(from + r * from_stride + v * LANES);
      if constexpr (IS_INT8<Panels>)
        sum[r][v] = fma(sum[r][v],
                        broadcast(*unit_of(job, row + r, group)) * load(scales_of(job, first + v, group)), before);
      else
        sum[r][v] = sum[r][v] + before;
    }
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
  const Panels here{panels.base + first / 2 * panels.stride, panels.stride};
  constexpr bool is_int8 = IS_INT8<Panels>, is_dot = is_int8 && HAS_DOT;
  const float *x = is_int8 ? job.integers.values : job.rows.x;
  const i64 stride = is_int8 ? job.integers.stride : job.rows.x_stride;
  x += row * stride;
  const int8_t *bytes = job.integers.bytes + row * stride * 4;
  const i64 inputs = is_int8 ? round_up(job.inputs, 4) : job.inputs;
  for (i64 group = 0; group < inputs; group += GROUP<Panels>) {
    const i64 group_end = smaller(group + GROUP<Panels>, inputs);
    Floats sum[ROWS][VECTORS];
    if constexpr (is_dot) {
      Ints dots[ROWS][VECTORS];
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) dots[r][v] = broadcast_int(*start_of(job, row + r, group));
#pragma GCC unroll 2
      for (i64 k = group; k < group_end; k += 4) {
        Ints weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = Panels::words(here, k, v + SECOND);
        for (int r = 0; r < ROWS; ++r) {
          int32_t input;
          __builtin_memcpy(&input, bytes + r * stride * 4 + k, 4);
          for (int v = 0; v < VECTORS; ++v) dots[r][v] = dot(dots[r][v], weight[v], input);
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = to_floats(dots[r][v]);
    } else {
      for (int r = 0; r < ROWS; ++r) {
        const float start = is_int8 ? static_cast<float>(*start_of(job, row + r, group)) : 0.0F;
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = broadcast(start);
      }
      const auto add_products = [&](i64 k, int number) __attribute__((always_inline)) {
        Floats weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = Panels::read(here, k, number, v + SECOND);
        for (int r = 0; r < ROWS; ++r) {
          const Floats input = broadcast(x[r * stride + k]);
          for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(input, weight[v], sum[r][v]);
        }
      };
      i64 k = group;
#pragma GCC unroll 2
      for (; k + TOGETHER<Panels> <= group_end; k += TOGETHER<Panels>) {
        add_products(k, 0);
        add_products(k + 1, 1);
        if constexpr (TOGETHER<Panels> == 4) {
          add_products(k + 2, 2);
          add_products(k + 3, 3);
        }
      }
      if (k < group_end) add_products(k, 0);
    }
    end_group<Panels, ROWS, VECTORS>(job, row, first, group, group_end == inputs, sum);
  }
}

/// ROWS rows of all vectors first .. last - 1, an even number, in tiles as wide as fit.
template <int ROWS, int VECTORS, class Panels>
static __attribute__((noinline)) void strip(const Job &job, const Panels &panels, i64 row, i64 first, i64 last) {
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

/// p and u of rows, into `room`; zeros past the last input. Infinite and NaN values make u NaN.
static Integers rounded(const Rows &rows, i64 inputs, float *room, i64 stride) {
  const i64 groups = round_up(inputs, SCALE_GROUP) / SCALE_GROUP;
  float *values = room, *units = room + rows.count * stride;
  auto *bytes = reinterpret_cast<int8_t *>(room);
  auto *starts = reinterpret_cast<int32_t *>(units + rows.count * groups);
  const Floats zero = broadcast(0.0F), magic = broadcast(12582912.0F); // 1.5 * 2^23: what is added is rounded
  for (i64 row = 0; row < rows.count; ++row) {
    const float *x = rows.x + row * rows.x_stride;
    for (i64 group = 0; group < groups; ++group) {
      const i64 begin = group * SCALE_GROUP, end = smaller(begin + SCALE_GROUP, round_up(inputs, LANES));
      Floats largest = zero, poison = zero;
      for (i64 k = begin; k < end; k += LANES) {
        const Floats here = first_lanes(load(x + k), inputs - k, zero);
        largest = maximum(largest, absolute(here));
        poison = fma(here, zero, poison);
      }
      const float most = largest_lane(largest);
      const Floats inverse = broadcast(most > 1e-30F ? 127.0F / most : 0.0F);
      Ints sum = broadcast_int(0);
      for (i64 k = begin; k < end; k += LANES) {
        const Floats shifted = fma(first_lanes(load(x + k), inputs - k, zero), inverse, magic);
        const Ints p = as_ints(shifted) - as_ints(magic);
        sum = sum + p;
        if (HAS_DOT)
          store_bytes(bytes + row * stride * 4 + k, p);
        else
          store(values + row * stride + k, shifted - magic);
      }
      units[row * groups + group] = most / 127.0F + sum_of_lanes(poison);
      starts[row * groups + group] = -128 * sum_of_lanes(sum);
    }
  }
  return Integers{values, bytes, stride, groups, units, starts};
}

static inline i64 panels_of(const Linear &linear) { return round_up(linear.outputs, PANEL) / PANEL; }

/// What a thread computes products in.
struct Room {
  float *sums;     ///< [rows][SUMS_STRIDE]
  float *integers; ///< int8: [rows][stride], and two numbers for every group of 128
  i64 stride;
};

/// Panels first .. last - 1 of the product with a linear layer, in their places of y; offsets count from `packed`.
static void product(const Linear &linear, i64 first, i64 last, const unsigned char *packed, const Rows &rows,
                    const Room &room) {
  const i64 bytes = panel_bytes(linear.format, linear.inputs);
  const i64 scale_stride = round_up(linear.inputs, SCALE_GROUP) / SCALE_GROUP * PANEL;
  // Panels that are computed together: as many as the tiles are wide.
  const i64 together = larger(1, vectors_of(static_cast<int>(smaller(rows.count, TALLEST))) / 2);
  Integers integers{};
  if (linear.format == Format::int8) integers = rounded(rows, linear.inputs, room.integers, room.stride);
  for (i64 panel = first; panel < last; panel += together) {
    const i64 vectors = 2 * smaller(together, last - panel);
    const unsigned char *base = packed + linear.panels + panel * bytes;
    const auto *words = reinterpret_cast<const uint32_t *>(base);
    const float *bias = reinterpret_cast<const float *>(packed + linear.bias) + panel * PANEL;
    Job job{rows, integers, linear.inputs, bias, nullptr, scale_stride, room.sums};
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

/// All of it.
static void product(const Linear &linear, const unsigned char *packed, const Rows &rows, const Room &room) {
  product(linear, 0, panels_of(linear), packed, rows, room);
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

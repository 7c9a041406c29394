/// Products with the weights: y = x W^T + b of some rows, for panels as drawn in layout.hpp.
///
///     y[r][n] = b[n] + sum_k x[r][k] W[n][k]
///
/// Each output is one chain of fused multiply-adds over k = 0, 1, .., that starts at b[n]; with int8 weights a chain from
/// 0 for each group of 128 k, and one over the groups from b[n]. So the bits of a row do not depend on the tile that it
/// is computed in. In plain loops:
///
///     for each row r, output n:
///       s = b[n]
///       float32, bfloat16:  for k:  s = fma(x[r][k], W[n][k], s)
///       int8:               for g:  t = 0;  for k in group g:  t = fma(x[r][k], q[n][k], t);  s = fma(t, scale[n][g], s)
///       y[r][n] = s, or y[r][n] + s
///
/// A tile of ROWS rows and VECTORS vectors of 16 outputs stays in registers over k: many rows take one panel, one or two
/// rows several, so that enough chains run side by side to hide the latency of a multiply-add.
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

/// Up to so many rows read bfloat16 and int8 weights as they are; more rows share a piece made float32 first.
constexpr i64 DIRECT_ROWS = 2;

/// x [count, inputs] and y [count, outputs]; a row of y is written up to a whole panel.
struct Rows {
  const float *x;
  i64 x_stride;
  float *y;
  i64 y_stride;
  i64 count;
  bool add; ///< y += instead of y =
};

/// Room for a product, of the workspace.
struct Scratch {
  float *piece; ///< [SCALE_GROUP][PANEL], weights made float32
  float *sums;  ///< [rows][SUMS_STRIDE]
};

// How a tile reads weight vector v of input k. `base` is the start of its first panel, `stride` leads to the next one.

struct Float32Panels {
  const float *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Float32Panels &p, i64 k, i64 v) {
    return load(p.base + v / 2 * p.stride + k * PANEL + v % 2 * LANES);
  }
};

struct Bfloat16Panels {
  const uint32_t *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Bfloat16Panels &p, i64 k, i64 v) {
    const Ints word = load(p.base + v / 2 * p.stride + k * LANES);
    return as_floats(v % 2 == 0 ? shift_left(word, 16) : bits_and(word, -65536));
  }
};

struct Int8Panels {
  const uint32_t *base;
  i64 stride;
  TARFLOW_NATIVE_INLINE Floats read(const Int8Panels &p, i64 k, i64 v) {
    const Ints word = load(p.base + v / 2 * p.stride + k / 2 * LANES);
    return to_floats(shift_right(shift_left(word, static_cast<int>(24 - 8 * (k % 2 * 2 + v % 2))), 24));
  }
};

/// What a tile starts from and where it leaves its sums.
enum class Stage {
  whole,     ///< bias -> y
  continued, ///< sums -> sums
  scaled,    ///< 0 -> sums = fma(sum, scale, sums)
};

struct Job {
  Rows rows;
  const float *bias;   ///< of the vectors that are computed
  const float *scales; ///< of these vectors and this group: [panels][32], `scale_stride` apart
  i64 scale_stride;
  float *sums; ///< [rows][SUMS_STRIDE]
};

/// Rows row .. row + ROWS - 1, vectors first .. first + VECTORS - 1, inputs offset .. offset + inputs - 1 of x.
template <int ROWS, int VECTORS, Stage STAGE, class Panels>
TARFLOW_NATIVE_INLINE void tile(const Job &job, const Panels &panels, i64 row, i64 first, i64 offset, i64 inputs) {
  const Rows &rows = job.rows;
  const Panels here{panels.base + first / 2 * panels.stride, panels.stride};
  const i64 half = VECTORS == 1 ? first % 2 : 0; // a single vector may be the second of its panel
  const float *x = rows.x + row * rows.x_stride + offset;
  float *sums = job.sums + row * SUMS_STRIDE + first * LANES;
  Floats sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sum[r][v] = STAGE == Stage::whole       ? load(job.bias + (first + v) * LANES)
                  : STAGE == Stage::continued ? load(sums + r * SUMS_STRIDE + v * LANES)
                                              : broadcast(0.0F);
#pragma GCC unroll 2
  for (i64 k = 0; k < inputs; ++k) {
    Floats weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = Panels::read(here, k, half + v);
    for (int r = 0; r < ROWS; ++r) {
      const Floats input = broadcast(x[r * rows.x_stride + k]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(input, weight[v], sum[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      if constexpr (STAGE == Stage::whole) {
        float *y = rows.y + (row + r) * rows.y_stride + (first + v) * LANES;
        store(y, rows.add ? load(y) + sum[r][v] : sum[r][v]);
      } else {
        float *to = sums + r * SUMS_STRIDE + v * LANES;
        if constexpr (STAGE == Stage::scaled) {
          const float *scale = job.scales + (first + v) / 2 * job.scale_stride + (first + v) % 2 * LANES;
          sum[r][v] = fma(sum[r][v], load(scale), load(to));
        }
        store(to, sum[r][v]);
      }
    }
  }
}

/// ROWS rows of all vectors first .. end - 1, an even number, in tiles as wide as fit.
template <int ROWS, int VECTORS, Stage STAGE, class Panels>
static void strip(const Job &job, const Panels &panels, i64 row, i64 first, i64 end, i64 offset, i64 inputs) {
  for (; first + VECTORS <= end; first += VECTORS) tile<ROWS, VECTORS, STAGE>(job, panels, row, first, offset, inputs);
  if constexpr (VECTORS > 2) strip<ROWS, VECTORS / 2, STAGE>(job, panels, row, first, end, offset, inputs);
}

template <Stage STAGE, class Panels>
using Strip = void (*)(const Job &, const Panels &, i64, i64, i64, i64, i64);

/// The strip of `rows` <= ROWS rows.
template <Stage STAGE, class Panels, int ROWS>
static void strip_of(i64 rows, const Job &job, const Panels &panels, i64 row, i64 vectors, i64 offset, i64 inputs) {
  if (rows == ROWS) return strip<ROWS, vectors_of(ROWS), STAGE>(job, panels, row, 0, vectors, offset, inputs);
  if constexpr (ROWS > 1) strip_of<STAGE, Panels, ROWS - 1>(rows, job, panels, row, vectors, offset, inputs);
}

/// All rows, in as few tiles as possible, all but the last of the same height.
template <Stage STAGE, int MOST, class Panels>
static void all_rows(const Job &job, const Panels &panels, i64 vectors, i64 offset, i64 inputs) {
  const i64 count = job.rows.count, tiles = (count + MOST - 1) / MOST, height = (count + tiles - 1) / tiles;
  for (i64 row = 0; row < count; row += height)
    strip_of<STAGE, Panels, MOST>(smaller(height, count - row), job, panels, row, vectors, offset, inputs);
}

/// Weights k .. k + inputs - 1 of a panel made float32: [inputs][32].
template <class Panels>
static void unpack(const Panels &panel, i64 inputs, float *piece) {
  for (i64 k = 0; k < inputs; ++k)
    for (i64 v = 0; v < 2; ++v) store(piece + k * PANEL + v * LANES, Panels::read(panel, k, v));
}

static void begin_sums(const Job &job, i64 vectors) {
  for (i64 r = 0; r < job.rows.count; ++r)
    for (i64 v = 0; v < vectors; ++v) store(job.sums + r * SUMS_STRIDE + v * LANES, load(job.bias + v * LANES));
}

static void end_sums(const Job &job, i64 vectors) {
  for (i64 r = 0; r < job.rows.count; ++r) {
    for (i64 v = 0; v < vectors; ++v) {
      const Floats sum = load(job.sums + r * SUMS_STRIDE + v * LANES);
      float *y = job.rows.y + r * job.rows.y_stride + v * LANES;
      store(y, job.rows.add ? load(y) + sum : sum);
    }
  }
}

/// bfloat16 and int8: groups of 128 inputs, `PER_WORD` of which share a word. Two rows read the panels as they are.
template <Stage STAGE, i64 PER_WORD, class Panels>
static void grouped(Job job, const Panels &panels, i64 vectors, i64 inputs, float *piece) {
  begin_sums(job, vectors);
  for (i64 k = 0; k < inputs; k += SCALE_GROUP, job.scales += PANEL) {
    const i64 count = smaller(SCALE_GROUP, inputs - k);
    const Panels group{panels.base + k / PER_WORD * LANES, panels.stride};
    if (job.rows.count <= DIRECT_ROWS) {
      all_rows<STAGE, DIRECT_ROWS>(job, group, vectors, k, count);
    } else {
      unpack(group, count, piece);
      all_rows<STAGE, TALLEST>(job, Float32Panels{piece, 0}, vectors, k, count);
    }
  }
  end_sums(job, vectors);
}

/// The product with a linear layer of the packed block that begins at `packed`.
static void product(const Linear &linear, const unsigned char *packed, Rows rows, const Scratch &scratch) {
  const i64 panels = round_up(linear.outputs, PANEL) / PANEL, bytes = panel_bytes(linear.format, linear.inputs);
  const i64 scale_stride = round_up(linear.inputs, SCALE_GROUP) / SCALE_GROUP * PANEL;
  // Panels that are computed together: more than one where tiles are that wide.
  const bool direct = linear.format == Format::float32 || rows.count <= DIRECT_ROWS;
  const i64 height = smaller(rows.count, TALLEST), together = direct ? larger(1, vectors_of(static_cast<int>(height)) / 2) : 1;
  for (i64 panel = 0; panel < panels; panel += together) {
    const i64 vectors = 2 * smaller(together, panels - panel), skip = panel * PANEL;
    const unsigned char *base = packed + linear.panels + panel * bytes;
    Job job{rows, reinterpret_cast<const float *>(packed + linear.bias) + skip,
            reinterpret_cast<const float *>(packed + linear.scales) + panel * scale_stride, scale_stride, scratch.sums};
    job.rows.y += skip;
    const auto *words = reinterpret_cast<const uint32_t *>(base);
    if (linear.format == Format::float32)
      all_rows<Stage::whole, TALLEST>(job, Float32Panels{reinterpret_cast<const float *>(base), bytes / 4}, vectors, 0,
                                      linear.inputs);
    else if (linear.format == Format::bfloat16)
      grouped<Stage::continued, 1>(job, Bfloat16Panels{words, bytes / 4}, vectors, linear.inputs, scratch.piece);
    else
      grouped<Stage::scaled, 2>(job, Int8Panels{words, bytes / 4}, vectors, linear.inputs, scratch.piece);
  }
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

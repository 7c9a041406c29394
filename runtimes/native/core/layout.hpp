/// Where everything lies: the weights of a packed block, and the workspace of a group of images.
///
/// A packed block, each part at a multiple of 64 bytes:
///
///     Header | pos_embed [N, W'] | class_embed [classes + 1, W'] | proj_in | layer 0 | .. | layer L-1 | proj_out
///     layer:  norm, qkv, proj, norm, expand, contract
///     norm:   gamma [W'], beta [W']; not with float32, where they are folded into the matrix that follows
///     linear: panels, bias [outputs']; int8 also scales
///
/// W' is W filled up with zeros to a multiple of 32. A panel holds the weights of 32 outputs, input by input:
///
///     float32   float  [inputs][32]
///     bfloat16  uint32 [inputs][16]                output c in the lower half of word c, output c + 16 in the upper
///     int8      uint32 [ceil(inputs / 4)][2][16]   bytes of word c: q + 128 of inputs k .. k + 3, output c
///               scales float [ceil(inputs / 128)][32], one set a panel
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "tarflow_native.h"

namespace tarflow_native {

using i64 = int64_t;
using Shape = tarflow_native_shape;

constexpr i64 LANES = 16;        ///< of a vector
constexpr i64 PANEL = 32;        ///< outputs of a panel
constexpr i64 SCALE_GROUP = 128; ///< int8 weights of an output that share a scale
constexpr i64 CHAIN = 64;        ///< inputs of a product that are summed in one chain
constexpr i64 SUMS_STRIDE = 128; ///< floats of a row's sums: the outputs of the widest tile
constexpr i64 MLP_EXPANSION = 4;
constexpr i64 HEADS_TOGETHER = 8; ///< of any rows, whose attention is computed side by side

enum class Format : int32_t { float32, bfloat16, int8 };

/// y = x W^T + b; offsets are in bytes.
struct Linear {
  Format format;
  i64 inputs, outputs;
  i64 panels, scales, bias;
};

/// Both -1 where they are folded into the matrix that follows.
struct Norm {
  i64 gamma, beta;
};

struct Layer {
  Norm attention_norm, mlp_norm;
  Linear qkv, proj, expand, contract;
};

/// Offsets from the start of a packed block; those of `layer` from the start of a layer.
struct Layout {
  i64 pos_embed, class_embed;
  Linear proj_in, proj_out;
  Layer layer;
  i64 first_layer, layer_bytes;
  i64 bytes;
};

/// What a packed block begins with.
struct Header {
  char magic[8];
  i64 abi;
  Shape shape;
  i64 format;
  i64 bytes;
};

constexpr char MAGIC[8] = {'T', 'F', 'N', 'A', 'T', 'I', 'V', 'E'};

/// Offsets from the start of a workspace, for `rows` = G * images; strides are in floats. Each member of a team has its
/// own room from `normed` on, `member_bytes` after that of the one before.
///
/// Keys and values are filled patch by patch and never cleared:
///
///     keys   [L][rows][H][blocks of 16 positions][E][16]
///     values [L][rows][H][positions][E']                    E' is E filled up to a multiple of 16
struct Workspace {
  i64 width_stride, wide_stride, out_stride, value_stride, logits_stride, integers_stride;
  i64 x, h, wide, attended, out, z;
  i64 normed, logits, sums, integers;
  i64 keys, values;
  i64 key_row, value_row; ///< floats of one layer and row
  i64 cleared;            ///< bytes that must be zero at first
  i64 member_bytes;
  i64 bytes;
};

/// Offsets from the start of what the threads share that take a group of images forward, and of what each has of its
/// own; strides are in floats. Rows are those of the group, [images][N - 1]; a tile of them is computed at once.
///
///     keys   [buffers][images][H][blocks of 16 positions][E][16]      of layer l in buffer l % buffers
///     values [buffers][images][H][positions][E']
///     state  PassState, then filled [tiles], done [tiles]: layers whose keys and values are written, that are finished
struct PassSpace {
  i64 tile, tiles;
  i64 buffers;
  i64 width_stride, wide_stride, out_stride, logits_stride;
  i64 h, keys, values, sums_of_a, state, state_bytes, shared_bytes;
  i64 normed, wide, out, patch, logits, sums, integers, integers_stride, own_bytes;
  i64 key_image, value_image; ///< floats of one image
};

/// Where the threads that share a group of images are.
struct PassState {
  i64 next;     ///< task to be taken: layer * tiles + tile
  i64 finished; ///< tiles
  i64 stopped;  ///< not 0: a thread was told to end
};

constexpr i64 MOST_QUERIES_TOGETHER = 4; ///< of any kernel

// Functions are static: each object is compiled for its own instruction set and must keep its own copies.

static inline i64 round_up(i64 count, i64 multiple) { return (count + multiple - 1) / multiple * multiple; }
static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

/// Whether two texts are equal; the core has no C library.
static inline bool same(const char *a, const char *b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

static inline i64 heads(const Shape &shape) { return shape.width / shape.head_dim; }
static inline i64 affine_values(const Shape &shape) { return shape.values * (shape.nvp ? 2 : 1); }

/// Takes `bytes` from a region that has grown to `*end`; returns where they begin.
static inline i64 take(i64 *end, i64 bytes) {
  const i64 begin = *end;
  *end = round_up(begin + bytes, TARFLOW_NATIVE_ALIGNMENT);
  return begin;
}

static inline i64 panel_bytes(Format format, i64 inputs) {
  if (format == Format::float32) return inputs * PANEL * 4;
  if (format == Format::bfloat16) return inputs * PANEL * 2;
  return round_up(inputs, 4) * PANEL;
}

static inline Linear take_linear(i64 *end, Format format, i64 inputs, i64 outputs) {
  const i64 panels = round_up(outputs, PANEL) / PANEL;
  Linear linear{format, inputs, outputs, 0, 0, 0};
  linear.panels = take(end, panels * panel_bytes(format, inputs));
  const i64 groups = round_up(inputs, SCALE_GROUP) / SCALE_GROUP;
  if (format == Format::int8) linear.scales = take(end, panels * groups * PANEL * 4);
  linear.bias = take(end, panels * PANEL * 4);
  return linear;
}

static inline Norm take_norm(i64 *end, Format format, i64 width) {
  if (format == Format::float32) return Norm{-1, -1};
  const i64 gamma = take(end, round_up(width, PANEL) * 4);
  return Norm{gamma, take(end, round_up(width, PANEL) * 4)};
}

static inline Layout layout_of(const Shape &shape, Format format) {
  const i64 width = shape.width, row = round_up(width, PANEL) * 4;
  const Format outer = format == Format::int8 ? Format::float32 : format; // of proj_in and proj_out
  Layout layout{};
  i64 end = round_up(sizeof(Header), TARFLOW_NATIVE_ALIGNMENT);
  layout.pos_embed = take(&end, shape.patches * row);
  layout.class_embed = take(&end, shape.classes ? (shape.classes + 1) * row : 0);
  layout.proj_in = take_linear(&end, outer, shape.values, width);
  layout.first_layer = end;
  i64 size = 0;
  layout.layer.attention_norm = take_norm(&size, format, width);
  layout.layer.qkv = take_linear(&size, format, width, 3 * width);
  layout.layer.proj = take_linear(&size, format, width, width);
  layout.layer.mlp_norm = take_norm(&size, format, width);
  layout.layer.expand = take_linear(&size, format, width, MLP_EXPANSION * width);
  layout.layer.contract = take_linear(&size, format, MLP_EXPANSION * width, width);
  layout.layer_bytes = size;
  end += shape.layers * size;
  layout.proj_out = take_linear(&end, outer, width, affine_values(shape));
  layout.bytes = end;
  return layout;
}

/// Floats from one row to the next: whole panels, and some more, so that rows do not share the sets of a cache.
static inline i64 row_stride(i64 count) { return round_up(count, PANEL) + LANES; }

/// Of rows whose values are rounded to int8: the values, and two numbers for every SCALE_GROUP.
static inline i64 integers_stride(const Shape &shape) {
  return row_stride(round_up(MLP_EXPANSION * shape.width, SCALE_GROUP));
}
static inline i64 integers_bytes(const Shape &shape, i64 rows) {
  return rows * (integers_stride(shape) + integers_stride(shape) / SCALE_GROUP * 2) * 4;
}

static inline Workspace workspace_of(const Shape &shape, i64 rows, i64 members) {
  const i64 positions = shape.patches - 1, position_blocks = round_up(positions, LANES);
  const i64 head_values = round_up(shape.head_dim, LANES);
  Workspace space{};
  space.width_stride = row_stride(shape.width + head_values);
  space.wide_stride = row_stride(MLP_EXPANSION * shape.width);
  space.out_stride = row_stride(affine_values(shape) + LANES);
  space.value_stride = row_stride(shape.values);
  i64 end = 0;
  space.x = take(&end, rows * space.value_stride * 4);
  space.h = take(&end, rows * space.width_stride * 4);
  space.wide = take(&end, rows * space.wide_stride * 4);
  space.attended = take(&end, rows * space.width_stride * 4);
  space.out = take(&end, rows * space.out_stride * 4);
  space.z = take(&end, space.value_stride * 4);
  space.cleared = end;
  space.logits_stride = position_blocks;
  space.normed = take(&end, rows * space.width_stride * 4);
  space.logits = take(&end, HEADS_TOGETHER * space.logits_stride * 4);
  space.sums = take(&end, rows * SUMS_STRIDE * 4);
  space.integers_stride = integers_stride(shape);
  space.integers = take(&end, integers_bytes(shape, rows));
  space.member_bytes = end - space.normed;
  end += (members - 1) * space.member_bytes;
  space.key_row = heads(shape) * position_blocks * shape.head_dim;
  space.value_row = heads(shape) * positions * head_values;
  space.keys = take(&end, shape.layers * rows * space.key_row * 4);
  space.values = take(&end, shape.layers * rows * space.value_row * 4);
  space.bytes = end;
  return space;
}

/// For `images` of which tiles of `tile` rows are computed at once.
static inline PassSpace pass_space_of(const Shape &shape, i64 images, i64 tile, i64 buffers) {
  const Workspace rows = workspace_of(shape, 1, 1);
  PassSpace space{};
  space.tile = tile;
  space.tiles = round_up(images * (shape.patches - 1), tile) / tile;
  space.buffers = buffers;
  space.width_stride = rows.width_stride;
  space.wide_stride = rows.wide_stride;
  space.out_stride = rows.out_stride;
  space.logits_stride = rows.logits_stride;
  space.key_image = rows.key_row;
  space.value_image = rows.value_row;
  i64 end = 0;
  space.h = take(&end, images * (shape.patches - 1) * space.width_stride * 4);
  space.keys = take(&end, buffers * images * space.key_image * 4);
  space.values = take(&end, buffers * images * space.value_image * 4);
  space.sums_of_a = take(&end, images * (shape.patches - 1) * 8);
  space.state_bytes = static_cast<i64>(sizeof(PassState)) + 2 * space.tiles * 8;
  space.state = take(&end, space.state_bytes);
  space.shared_bytes = end;
  end = 0;
  space.normed = take(&end, tile * space.width_stride * 4);
  space.wide = take(&end, tile * space.wide_stride * 4);
  space.out = take(&end, tile * space.out_stride * 4);
  space.patch = take(&end, row_stride(shape.values) * 4);
  space.logits = take(&end, MOST_QUERIES_TOGETHER * space.logits_stride * 4);
  space.sums = take(&end, tile * SUMS_STRIDE * 4);
  space.integers_stride = integers_stride(shape);
  space.integers = take(&end, integers_bytes(shape, tile));
  space.own_bytes = end;
  return space;
}

} // namespace tarflow_native

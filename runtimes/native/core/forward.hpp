/// The forward pass of one block: patches to noise, the patches of an image as rows under the causal mask.
///
///     h_i = W_in x_i + b_in + (pos_embed_i + class_embed)                                  for i = 0 .. N - 2
///     for each layer:  h_i += W_o attention(norm(h_i), K_0..i, V_0..i) + b_o
///                      h_i += W_2 gelu(W_1 norm(h_i) + b_1) + b_2
///     (a, b) = W_out h_i + b_out
///     z_0 = x_0;   z_{i+1} = (x_{i+1} - b) exp(-a);   log|det| = -sum of a
///
/// Every sum is that of the inverse: (a, b) of a patch have the same bits there. log|det| is summed in float64.
///
/// A task is one layer of one tile of rows: a few whole images, or 16 n patches of one. Tasks are numbered layer by
/// layer, and in a layer tile by tile; threads that share a group of images take them in this order, so that the first
/// one that is not finished never waits. Before a task
///
///   * writes keys and values:  what read their buffer, `buffers` layers ago, is finished;
///   * attends:                 the earlier tiles' keys and values of this layer are written.
#pragma once

#include "attention.hpp"
#include "block.hpp"
#include "norm.hpp"
#include "product.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

static_assert(MOST_QUERIES <= MOST_QUERIES_TOGETHER);

/// Pointers into the workspace, and what all tasks share.
struct Passing {
  const Pass &pass;
  const Shape &shape;
  const PassSpace &space;
  i64 positions, rows; ///< of an image; of the group
  float *h, *keys, *values;
  double *sums_of_a;
  PassState *state;
  i64 *filled, *done;
  float *normed, *wide, *out, *patch, *logits;
  Room room;
};

static Passing passing_of(const Pass &pass) {
  const PassSpace &space = pass.space;
  const auto shared = [&](i64 offset) { return reinterpret_cast<float *>(pass.shared + offset); };
  const auto own = [&](i64 offset) { return reinterpret_cast<float *>(pass.own + offset); };
  auto *state = reinterpret_cast<PassState *>(pass.shared + space.state);
  auto *filled = reinterpret_cast<i64 *>(state + 1);
  const i64 positions = pass.shape->patches - 1;
  return Passing{pass, *pass.shape, space, positions, pass.count * positions, shared(space.h), shared(space.keys),
                 shared(space.values), reinterpret_cast<double *>(pass.shared + space.sums_of_a), state, filled,
                 filled + space.tiles, own(space.normed), own(space.wide), own(space.out), own(space.patch),
                 own(space.logits), Room{own(space.sums), own(space.integers), space.integers_stride}};
}

/// Rows of a group.
struct Tile {
  i64 number, first, count;
};

/// Patches of one image in a tile: the first one's row within the tile.
struct Piece {
  i64 image, position, row, count;
};

template <class Work>
static void each_piece(const Passing &run, const Tile &tile, const Work &work) {
  for (i64 row = 0; row < tile.count;) {
    const i64 image = (tile.first + row) / run.positions, position = (tile.first + row) % run.positions;
    const i64 count = smaller(run.positions - position, tile.count - row);
    work(Piece{image, position, row, count});
    row += count;
  }
}

/// h = W_in x + b_in + (pos_embed + class_embed).
static void embed_tile(const Passing &run, const Tile &tile) {
  const Layout &layout = *run.pass.layout;
  const i64 stride = run.space.width_stride, values = run.shape.values;
  const i64 row_bytes = round_up(run.shape.width, PANEL) * 4;
  const auto packed = [&](i64 offset) { return reinterpret_cast<const float *>(run.pass.packed + offset); };
  each_piece(run, tile, [&](const Piece &piece) {
    const float *x = run.pass.x + (piece.image * run.shape.patches + piece.position) * values;
    float *h = run.h + (tile.first + piece.row) * stride;
    product(layout.proj_in, run.pass.packed, Rows{x, values, h, stride, piece.count, false}, run.room);
    const i64 *labels = run.pass.labels;
    const float *label = labels ? packed(layout.class_embed + labels[piece.image] * row_bytes) : nullptr;
    for (i64 row = 0; row < piece.count; ++row) {
      const float *place = packed(layout.pos_embed + (piece.position + row) * row_bytes);
      float *to = h + row * stride;
      for (i64 i = 0; i < round_up(run.shape.width, LANES); i += LANES) {
        const Floats embedding = label ? load(place + i) + load(label + i) : load(place + i);
        store(to + i, load(to + i) + embedding);
      }
    }
  });
}

/// normed = norm(h). Gamma and beta are folded into what follows where the norm has none.
static void normalise_tile(const Passing &run, const Tile &tile, const Norm &norm, const unsigned char *layer) {
  const float *gamma = norm.gamma >= 0 ? reinterpret_cast<const float *>(layer + norm.gamma) : nullptr;
  const float *beta = norm.gamma >= 0 ? reinterpret_cast<const float *>(layer + norm.beta) : nullptr;
  const i64 stride = run.space.width_stride;
  for (i64 row = 0; row < tile.count; ++row)
    normalise(run.h + (tile.first + row) * stride, gamma, beta, run.shape.width, run.normed + row * stride);
}

/// Where the keys and values of one head of an image begin.
struct HeadCache {
  float *keys, *values;
};

static HeadCache cache_of(const Passing &run, i64 layer, i64 image, i64 head) {
  const i64 count = heads(run.shape), entry = layer % run.space.buffers * run.pass.count + image;
  return HeadCache{run.keys + entry * run.space.key_image + head * (run.space.key_image / count),
                   run.values + entry * run.space.value_image + head * (run.space.value_image / count)};
}

/// Keys and values of the tile from `wide`.
static void append_tile(const Passing &run, const Tile &tile, i64 layer) {
  const i64 width = run.shape.width, size = run.shape.head_dim;
  each_piece(run, tile, [&](const Piece &piece) {
    for (i64 head = 0; head < heads(run.shape); ++head) {
      const HeadCache cache = cache_of(run, layer, piece.image, head);
      for (i64 row = 0; row < piece.count; ++row) {
        const float *k = run.wide + (piece.row + row) * run.space.wide_stride + width + head * size;
        append_key(k, piece.position + row, size, cache.keys);
        append_value(k + width, piece.position + row, size, cache.values);
      }
    }
  });
}

/// Attention of QUERIES patches that follow each other, of one head: q [.][E] -> out [.][E'].
template <int QUERIES>
static void attend_queries(const Passing &run, const HeadCache &cache, i64 position, const float *q, float *out) {
  const i64 size = run.shape.head_dim, stride = run.space.logits_stride;
  float total[QUERIES];
  head_logits<QUERIES>(q, run.space.wide_stride, cache.keys, position + QUERIES, size, run.logits, stride);
  for (int r = 0; r < QUERIES; ++r) total[r] = exponentials(run.logits + r * stride, position + r + 1);
  head_values<QUERIES>(run.logits, stride, position + 1, cache.values, size, total, out, run.space.width_stride);
}

/// normed = attention of the tile's rows, from q in `wide` and the caches.
static void attend_tile(const Passing &run, const Tile &tile, i64 layer) {
  const i64 size = run.shape.head_dim, wide = run.space.wide_stride, narrow = run.space.width_stride;
  if (run.pass.layout->layer.qkv.format != Format::float32) { // else folded into the weights of q
    const float factor = 1.0F / __builtin_sqrtf(static_cast<float>(size));
    for (i64 row = 0; row < tile.count; ++row)
      for (i64 i = 0; i < run.shape.width; ++i) run.wide[row * wide + i] *= factor;
  }
  each_piece(run, tile, [&](const Piece &piece) {
    // A head whose size is not a multiple of 16 writes zeros after itself, where the next one follows.
    for (i64 head = 0; head < heads(run.shape); ++head) {
      const HeadCache cache = cache_of(run, layer, piece.image, head);
      const float *q = run.wide + piece.row * wide + head * size;
      float *out = run.normed + piece.row * narrow + head * size;
      i64 row = 0;
      for (; row + MOST_QUERIES <= piece.count; row += MOST_QUERIES)
        attend_queries<MOST_QUERIES>(run, cache, piece.position + row, q + row * wide, out + row * narrow);
      for (; row < piece.count; ++row)
        attend_queries<1>(run, cache, piece.position + row, q + row * wide, out + row * narrow);
    }
  });
}

/// Waits until `*count` has come to `least`; false where a thread was told to end.
static bool wait_for(const Passing &run, const i64 *count, i64 least) {
  while (__atomic_load_n(count, __ATOMIC_ACQUIRE) < least) {
    if (__atomic_load_n(&run.state->stopped, __ATOMIC_RELAXED)) return false;
    run.pass.wait();
  }
  return true;
}

/// One layer of a tile; false where a thread was told to end.
static bool run_tile(const Passing &run, const Tile &tile, i64 layer) {
  const Layout &layout = *run.pass.layout;
  const Layer &parts = layout.layer;
  const unsigned char *base = run.pass.packed + layout.first_layer + layer * layout.layer_bytes;
  const i64 narrow = run.space.width_stride, wide = run.space.wide_stride, count = tile.count;
  float *h = run.h + tile.first * narrow;
  if (!wait_for(run, run.done + tile.number, layer)) return false;
  if (layer == 0) embed_tile(run, tile);
  normalise_tile(run, tile, parts.attention_norm, base);
  product(parts.qkv, base, Rows{run.normed, narrow, run.wide, wide, count, false}, run.room);
  for (i64 i = 0; i < run.space.tiles; ++i)
    if (!wait_for(run, run.done + i, layer - run.space.buffers + 1)) return false;
  append_tile(run, tile, layer);
  __atomic_store_n(run.filled + tile.number, layer + 1, __ATOMIC_RELEASE);
  for (i64 i = 0; i < tile.number; ++i)
    if (!wait_for(run, run.filled + i, layer + 1)) return false;
  attend_tile(run, tile, layer);
  product(parts.proj, base, Rows{run.normed, narrow, h, narrow, count, true}, run.room);
  normalise_tile(run, tile, parts.mlp_norm, base);
  product(parts.expand, base, Rows{run.normed, narrow, run.wide, wide, count, false}, run.room);
  for (i64 row = 0; row < count; ++row)
    for (i64 i = 0; i < MLP_EXPANSION * run.shape.width; i += LANES)
      store(run.wide + row * wide + i, gelu(load(run.wide + row * wide + i)));
  product(parts.contract, base, Rows{run.wide, wide, h, narrow, count, true}, run.room);
  __atomic_store_n(run.done + tile.number, layer + 1, __ATOMIC_RELEASE);
  return true;
}

/// z = (x - b) exp(-a) of the patch after `position`; returns the sum of a: 16 lanes side by side, folded in halves.
static double transform_patch(const Passing &run, const Piece &piece, i64 row) {
  const i64 values = run.shape.values;
  const i64 at = (piece.image * run.shape.patches + piece.position + row + 1) * values;
  const float *a = run.out + (piece.row + row) * run.space.out_stride, *b = run.shape.nvp ? a + values : a;
  double sum[LANES] = {};
  __builtin_memcpy(run.patch, run.pass.x + at, static_cast<size_t>(values) * 4);
  for (i64 i = 0; i < values; i += LANES) {
    Floats z = load(run.patch + i) - load(b + i);
    if (run.shape.nvp) {
      const Floats zero = broadcast(0.0F), scale = first_lanes(load(a + i), values - i, zero);
      float lane[LANES];
      store(lane, scale);
      for (int n = 0; n < LANES; ++n) sum[n] += static_cast<double>(lane[n]);
      z = z * exp(zero - scale);
    }
    store(run.patch + i, z);
  }
  __builtin_memcpy(run.pass.z + at, run.patch, static_cast<size_t>(values) * 4);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int n = 0; n < half; ++n) sum[n] += sum[n + half];
  return sum[0];
}

/// log|det| of all images, patch after patch.
static void add_up(const Passing &run) {
  for (i64 image = 0; image < run.pass.count; ++image) {
    double sum = 0;
    for (i64 i = 0; i < run.positions; ++i) sum += run.sums_of_a[image * run.positions + i];
    run.pass.log_det[image] = 0 - sum;
  }
}

/// The affine map of a tile, and of the whole group what is left when its last tile is finished.
static void transform_tile(const Passing &run, const Tile &tile) {
  const i64 values = run.shape.values;
  product(run.pass.layout->proj_out, run.pass.packed,
          Rows{run.h + tile.first * run.space.width_stride, run.space.width_stride, run.out, run.space.out_stride,
               tile.count, false},
          run.room);
  each_piece(run, tile, [&](const Piece &piece) {
    const i64 first = piece.image * run.shape.patches * values;
    if (piece.position == 0)
      __builtin_memcpy(run.pass.z + first, run.pass.x + first, static_cast<size_t>(values) * 4);
    for (i64 row = 0; row < piece.count; ++row)
      run.sums_of_a[tile.first + piece.row + row] = transform_patch(run, piece, row);
  });
  if (__atomic_add_fetch(&run.state->finished, 1, __ATOMIC_ACQ_REL) == run.space.tiles) add_up(run);
  if (run.pass.progress) __atomic_fetch_add(run.pass.progress, tile.count, __ATOMIC_RELAXED);
}

static bool forward(const Pass &pass) {
  const Passing run = passing_of(pass);
  const i64 layers = run.shape.layers, tiles = run.space.tiles;
  __builtin_memset(run.patch, 0, static_cast<size_t>(round_up(run.shape.values, LANES)) * 4);
  for (i64 task; (task = __atomic_fetch_add(&run.state->next, 1, __ATOMIC_RELAXED)) < layers * tiles;) {
    if (pass.cancel && __atomic_load_n(pass.cancel, __ATOMIC_RELAXED))
      __atomic_store_n(&run.state->stopped, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&run.state->stopped, __ATOMIC_RELAXED)) return false;
    const i64 layer = task / tiles, number = task % tiles, first = number * run.space.tile;
    const Tile tile{number, first, smaller(run.space.tile, run.rows - first)};
    if (!run_tile(run, tile, layer)) return false;
    if (layer + 1 == layers) transform_tile(run, tile);
  }
  return true;
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

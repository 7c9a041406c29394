/// Causal attention of one position, or a few that follow each other, over the positions before each and itself.
///
///     out = softmax(q K^T) V
///
/// Keys of a head: [blocks of 16 positions][E][16], so that q k of 16 positions is one vector and needs no horizontal
/// sum. Values of a head: [positions][E'], E' a multiple of 16. Only filled positions are read.
#pragma once

#include "functions.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

/// Blocks of keys, and vectors of values, that are in registers at once.
constexpr int KEY_BLOCKS = HELD == 32 ? 4 : HELD == 8 ? 2 : 1;
constexpr int VALUE_VECTORS = KEY_BLOCKS;

/// Queries that read the keys and values together where there are many, and their blocks or vectors in registers.
constexpr int MOST_QUERIES = HELD == 32 ? 4 : HELD == 8 ? 2 : 1;
constexpr int TILE_BLOCKS = HELD == 32 ? 2 : 1;

/// Write k [E] of a position; the other positions of a new block become zero.
static void append_key(const float *k, i64 position, i64 head_dim, float *keys) {
  float *block = keys + position / LANES * LANES * head_dim;
  const i64 lane = position % LANES;
  for (i64 e = 0; e < head_dim; ++e) {
    if (lane == 0) store(block + e * LANES, broadcast(0.0F));
    block[e * LANES + lane] = k[e];
  }
}

/// Write v [E] of a position.
static void append_value(const float *v, i64 position, i64 head_dim, float *values) {
  const i64 stride = round_up(head_dim, LANES);
  float *to = values + position * stride;
  for (i64 e = 0; e < head_dim; ++e) to[e] = v[e];
  for (i64 e = head_dim; e < stride; ++e) to[e] = 0.0F;
}

/// logits[j] = sum of q[e] K[j][e] over even e + the same over odd e, of QUERIES queries and BLOCKS blocks of 16
/// positions.
template <int QUERIES, int BLOCKS>
static void logits_of(const float *q, i64 q_stride, const float *keys, i64 head_dim, float *logits, i64 stride) {
  const i64 block = head_dim * LANES;
  Floats even[QUERIES][BLOCKS], odd[QUERIES][BLOCKS];
  for (int r = 0; r < QUERIES; ++r)
    for (int n = 0; n < BLOCKS; ++n) even[r][n] = odd[r][n] = broadcast(0.0F);
  const auto add_products = [&](i64 e, Floats (&sum)[QUERIES][BLOCKS]) __attribute__((always_inline)) {
    Floats key[BLOCKS];
    for (int n = 0; n < BLOCKS; ++n) key[n] = load(keys + n * block + e * LANES);
    for (int r = 0; r < QUERIES; ++r) {
      const Floats query = broadcast(q[r * q_stride + e]);
      for (int n = 0; n < BLOCKS; ++n) sum[r][n] = fma(query, key[n], sum[r][n]);
    }
  };
  i64 e = 0;
  for (; e + 1 < head_dim; e += 2) {
    add_products(e, even);
    add_products(e + 1, odd);
  }
  if (e < head_dim) add_products(e, even);
  for (int r = 0; r < QUERIES; ++r)
    for (int n = 0; n < BLOCKS; ++n) store(logits + r * stride + n * LANES, even[r][n] + odd[r][n]);
}

/// Logits -> exp(logit - largest), in place; returns their sum. Those from `count` up to a multiple of 16 become 0.
static float exponentials(float *logits, i64 count) {
  const Floats none = broadcast(-__builtin_inff()), zero = broadcast(0.0F);
  Floats largest = none, sum = zero;
  for (i64 j = 0; j < count; j += LANES) largest = maximum(largest, first_lanes(load(logits + j), count - j, none));
  const Floats shift = broadcast(largest_lane(largest));
  for (i64 j = 0; j < count; j += LANES) {
    // Masked before as well: a result below the normal range would take a hundred cycles.
    const Floats weight = first_lanes(exp(first_lanes(load(logits + j) - shift, count - j, zero)), count - j, zero);
    store(logits + j, weight);
    sum = sum + weight;
  }
  return sum_of_lanes(sum);
}

/// out = (sum of w[j] V[j] over even j + the same over odd j) / total, of QUERIES queries and VECTORS vectors of a
/// head. The first query reads `count` positions, each of the others one more than the one before.
template <int QUERIES, int VECTORS>
static void weighted_values(const float *weights, i64 weights_stride, i64 count, const float *values, i64 stride,
                            const float *total, float *out, i64 out_stride) {
  Floats sum[2][QUERIES][VECTORS]; // even, odd
  for (int r = 0; r < QUERIES; ++r)
    for (int n = 0; n < VECTORS; ++n) sum[0][r][n] = sum[1][r][n] = broadcast(0.0F);
  i64 j = 0;
  for (; j + 1 < count; j += 2)
    for (int parity = 0; parity < 2; ++parity)
      for (int r = 0; r < QUERIES; ++r) {
        const Floats weight = broadcast(weights[r * weights_stride + j + parity]);
        for (int n = 0; n < VECTORS; ++n)
          sum[parity][r][n] = fma(weight, load(values + (j + parity) * stride + n * LANES), sum[parity][r][n]);
      }
#pragma GCC unroll 8
  for (int last = 0; last < QUERIES; ++last) // what is not every query's, j being even
    for (int r = 0; r < QUERIES; ++r)
      for (int n = 0; j + last < count + r && n < VECTORS; ++n)
        sum[last % 2][r][n] = fma(broadcast(weights[r * weights_stride + j + last]),
                                  load(values + (j + last) * stride + n * LANES), sum[last % 2][r][n]);
  for (int r = 0; r < QUERIES; ++r)
    for (int n = 0; n < VECTORS; ++n)
      store(out + r * out_stride + n * LANES, (sum[0][r][n] + sum[1][r][n]) / broadcast(total[r]));
}

/// The logits of one head and QUERIES queries, for `count` positions.
template <int QUERIES>
static void head_logits(const float *q, i64 q_stride, const float *keys, i64 count, i64 head_dim, float *logits,
                        i64 stride) {
  constexpr int MOST = QUERIES == 1 ? KEY_BLOCKS : TILE_BLOCKS;
  const i64 blocks = round_up(count, LANES) / LANES, size = LANES * head_dim;
  i64 n = 0;
  for (; n + MOST <= blocks; n += MOST)
    logits_of<QUERIES, MOST>(q, q_stride, keys + n * size, head_dim, logits + n * LANES, stride);
  if (MOST > 2 && n + 2 <= blocks) {
    logits_of<QUERIES, 2>(q, q_stride, keys + n * size, head_dim, logits + n * LANES, stride);
    n += 2;
  }
  if (n < blocks) logits_of<QUERIES, 1>(q, q_stride, keys + n * size, head_dim, logits + n * LANES, stride);
}

/// The outputs of one head and QUERIES queries, [E'] each.
template <int QUERIES>
static void head_values(const float *weights, i64 weights_stride, i64 count, const float *values, i64 head_dim,
                        const float *total, float *out, i64 out_stride) {
  constexpr int MOST = QUERIES == 1 ? VALUE_VECTORS : TILE_BLOCKS;
  const i64 stride = round_up(head_dim, LANES), vectors = stride / LANES;
  i64 n = 0;
  for (; n + MOST <= vectors; n += MOST)
    weighted_values<QUERIES, MOST>(weights, weights_stride, count, values + n * LANES, stride, total, out + n * LANES,
                                   out_stride);
  for (; n < vectors; ++n)
    weighted_values<QUERIES, 1>(weights, weights_stride, count, values + n * LANES, stride, total, out + n * LANES,
                                out_stride);
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

/// Causal attention of one new position over the positions before it, for one row.
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

/// logits[j] = sum of q[e] K[j][e] over even e + the same over odd e, of BLOCKS blocks of 16 positions.
template <int BLOCKS>
static void logits_of(const float *q, const float *keys, i64 head_dim, float *logits) {
  const i64 block = head_dim * LANES;
  Floats even[BLOCKS], odd[BLOCKS];
  for (int n = 0; n < BLOCKS; ++n) even[n] = odd[n] = broadcast(0.0F);
  i64 e = 0;
  for (; e + 1 < head_dim; e += 2) {
    const Floats first = broadcast(q[e]), second = broadcast(q[e + 1]);
    for (int n = 0; n < BLOCKS; ++n) {
      even[n] = fma(first, load(keys + n * block + e * LANES), even[n]);
      odd[n] = fma(second, load(keys + n * block + (e + 1) * LANES), odd[n]);
    }
  }
  if (e < head_dim)
    for (int n = 0; n < BLOCKS; ++n) even[n] = fma(broadcast(q[e]), load(keys + n * block + e * LANES), even[n]);
  for (int n = 0; n < BLOCKS; ++n) store(logits + n * LANES, even[n] + odd[n]);
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

/// out = (sum of w[j] V[j] over even j + the same over odd j) / total, of VECTORS vectors of a head.
template <int VECTORS>
static void weighted_values(const float *weights, i64 count, const float *values, i64 stride, float total, float *out) {
  Floats even[VECTORS], odd[VECTORS];
  for (int n = 0; n < VECTORS; ++n) even[n] = odd[n] = broadcast(0.0F);
  i64 j = 0;
  for (; j + 1 < count; j += 2) {
    const Floats first = broadcast(weights[j]), second = broadcast(weights[j + 1]);
    for (int n = 0; n < VECTORS; ++n) {
      even[n] = fma(first, load(values + j * stride + n * LANES), even[n]);
      odd[n] = fma(second, load(values + (j + 1) * stride + n * LANES), odd[n]);
    }
  }
  if (j < count)
    for (int n = 0; n < VECTORS; ++n)
      even[n] = fma(broadcast(weights[j]), load(values + j * stride + n * LANES), even[n]);
  for (int n = 0; n < VECTORS; ++n) store(out + n * LANES, (even[n] + odd[n]) / broadcast(total));
}

/// The logits of one head, for `count` positions.
static void head_logits(const float *q, const float *keys, i64 count, i64 head_dim, float *logits) {
  const i64 blocks = round_up(count, LANES) / LANES, size = LANES * head_dim;
  i64 n = 0;
  for (; n + KEY_BLOCKS <= blocks; n += KEY_BLOCKS)
    logits_of<KEY_BLOCKS>(q, keys + n * size, head_dim, logits + n * LANES);
  if (KEY_BLOCKS > 2 && n + 2 <= blocks) {
    logits_of<2>(q, keys + n * size, head_dim, logits + n * LANES);
    n += 2;
  }
  if (n < blocks) logits_of<1>(q, keys + n * size, head_dim, logits + n * LANES);
}

/// The output of one head, [E'].
static void head_values(const float *weights, i64 count, const float *values, i64 head_dim, float total, float *out) {
  const i64 stride = round_up(head_dim, LANES), vectors = stride / LANES;
  i64 n = 0;
  for (; n + VALUE_VECTORS <= vectors; n += VALUE_VECTORS)
    weighted_values<VALUE_VECTORS>(weights, count, values + n * LANES, stride, total, out + n * LANES);
  for (; n < vectors; ++n) weighted_values<1>(weights, count, values + n * LANES, stride, total, out + n * LANES);
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

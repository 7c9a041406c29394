/// The block loop. This file is compiled once for each instruction set, and once more as portable C++.
///
///     x_0 = z_0
///     for i = 0 .. steps - 1:
///       h = W_in x_i + b_in + (pos_embed_i + class_embed)                    for each branch
///       for each layer:  h += W_o attention(norm(h), K, V) + b_o;   h += W_2 gelu(W_1 norm(h) + b_1) + b_2
///       (a, b) = W_out h + b_out of the first branch, + g ((a, b) - those of the second branch)
///       x_{i+1} = z_{i+1} exp(a) + b
///
/// Row g * images + j is branch g of image j. All sums of a row depend on that row alone.
#include "attention.hpp"
#include "block.hpp"
#include "forward.hpp"
#include "norm.hpp"
#include "product.hpp"
#include "team.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {
namespace {

/// Pointers into the workspace, and values shared by all steps of a group of images. `normed`, `logits` and `room`
/// belong to one thread.
struct Run {
  const Images &images;
  const Shape &shape;
  Workspace space;
  i64 rows;
  float *x, *h, *wide, *attended, *out, *z, *keys, *values;
  float *normed, *logits;
  Room room;
};

Run run_of(const Images &images, i64 member) {
  const i64 rows = images.branches * images.count;
  const Workspace space = workspace_of(*images.shape, rows, images.team ? images.team->members : 1);
  const auto at = [&](i64 offset) { return reinterpret_cast<float *>(images.workspace + offset); };
  const auto own = [&](i64 offset) { return at(offset + member * space.member_bytes); };
  return Run{images,        *images.shape, space,          rows,           at(space.x),      at(space.h),
             at(space.wide), at(space.attended), at(space.out), at(space.z), at(space.keys), at(space.values),
             own(space.normed), own(space.logits), Room{own(space.sums), own(space.integers), space.integers_stride}};
}

const float *packed(const Run &run, i64 offset) {
  return reinterpret_cast<const float *>(run.images.packed + offset);
}

/// h = W_in x + b_in once for each image, then for each branch + (pos_embed + class_embed).
void embed(const Run &run, i64 step) {
  const Images &images = run.images;
  const i64 stride = run.space.width_stride, row_bytes = round_up(run.shape.width, PANEL) * 4;
  product(images.layout->proj_in, images.packed,
          Rows{run.x, run.space.value_stride, run.h, stride, images.count, false}, run.room);
  const float *place = packed(run, images.layout->pos_embed + step * row_bytes);
  for (i64 branch = images.branches - 1; branch >= 0; --branch) { // the first one last: it is where the product lies
    for (i64 image = 0; image < images.count; ++image) {
      const float *from = run.h + image * stride;
      float *to = run.h + (branch * images.count + image) * stride;
      const i64 label = images.labels ? images.labels[branch * images.batch + image] : 0;
      const float *row = images.labels ? packed(run, images.layout->class_embed + label * row_bytes) : nullptr;
      for (i64 i = 0; i < round_up(run.shape.width, LANES); i += LANES) {
        const Floats embedding = row ? load(place + i) + load(row + i) : load(place + i);
        store(to + i, load(from + i) + embedding);
      }
    }
  }
}

/// normed = norm(h). Gamma and beta are folded into what follows where the norm has none.
void normalise_rows(const Run &run, const Norm &norm, const unsigned char *layer) {
  const float *gamma = norm.gamma >= 0 ? reinterpret_cast<const float *>(layer + norm.gamma) : nullptr;
  const float *beta = norm.gamma >= 0 ? reinterpret_cast<const float *>(layer + norm.beta) : nullptr;
  for (i64 row = 0; row < run.rows; ++row) {
    const i64 at = row * run.space.width_stride;
    normalise(run.h + at, gamma, beta, run.shape.width, run.normed + at);
  }
}

/// One head of one row: where its query, caches and output lie.
struct Head {
  float *q, *keys, *values, *out;
};

Head head_of(const Run &run, i64 layer, i64 row, i64 head) {
  const i64 count = heads(run.shape), at = head * run.shape.head_dim;
  return Head{run.wide + row * run.space.wide_stride + at,
              run.keys + (layer * run.rows + row) * run.space.key_row + head * (run.space.key_row / count),
              run.values + (layer * run.rows + row) * run.space.value_row + head * (run.space.value_row / count),
              run.attended + row * run.space.width_stride + at};
}

/// q of some columns times 1/tau, and times 1/sqrt(E) unless that is folded into the weights of q.
void scale_queries(const Run &run, i64 first, i64 last) {
  const Images &images = run.images;
  const float scale = images.layout->layer.qkv.format == Format::float32
                          ? 1.0F
                          : 1.0F / __builtin_sqrtf(static_cast<float>(run.shape.head_dim));
  for (i64 row = 0; row < run.rows; ++row) {
    const i64 condition = row / images.count * images.batch + row % images.count;
    const float factor = scale * (images.inverse_temperature ? images.inverse_temperature[condition] : 1.0F);
    float *q = run.wide + row * run.space.wide_stride;
    for (i64 i = first; factor != 1.0F && i < last; ++i) q[i] *= factor;
  }
}

/// attended = attention of the position `step` over the positions 0 .. step, from q, k, v in `wide`, of some heads.
///
/// In three phases over a few heads at a time, whose short chains of instructions then overlap.
void attend(const Run &run, i64 step, i64 layer, i64 first_head, i64 last_head) {
  const i64 width = run.shape.width, size = run.shape.head_dim, own = last_head - first_head, all = run.rows * own;
  const i64 stride = run.space.logits_stride;
  const auto numbered = [&](i64 i) { return head_of(run, layer, i / own, first_head + i % own); };
  scale_queries(run, first_head * size, last_head * size);
  for (i64 first = 0; first < all; first += HEADS_TOGETHER) {
    const i64 count = smaller(HEADS_TOGETHER, all - first);
    float total[HEADS_TOGETHER];
    for (i64 i = 0; i < count; ++i) {
      const Head head = numbered(first + i);
      append_key(head.q + width, step, size, head.keys);
      append_value(head.q + 2 * width, step, size, head.values);
      head_logits<1>(head.q, 0, head.keys, step + 1, size, run.logits + i * stride, 0);
    }
    for (i64 i = 0; i < count; ++i) total[i] = exponentials(run.logits + i * stride, step + 1);
    for (i64 i = 0; i < count; ++i) {
      // A head whose size is not a multiple of 16 writes zeros after itself, where the next one follows.
      const Head head = numbered(first + i);
      head_values<1>(run.logits + i * stride, 0, step + 1, head.values, size, &total[i], head.out, 0);
    }
  }
}

/// q, k and v of some heads. Where they are not all of them, a head is whole panels.
void project_heads(const Run &run, const unsigned char *base, i64 first_head, i64 last_head) {
  const Linear &qkv = run.images.layout->layer.qkv;
  const Rows rows{run.normed, run.space.width_stride, run.wide, run.space.wide_stride, run.rows, false};
  const i64 count = heads(run.shape), panels = run.shape.head_dim / PANEL;
  if (first_head == 0 && last_head == count) return product(qkv, base, rows, run.room);
  for (i64 kind = 0; kind < 3; ++kind)
    product(qkv, (kind * count + first_head) * panels, (kind * count + last_head) * panels, base, rows, run.room);
}

/// A layer, in four phases of a team, after each of which all columns are there.
void run_layer(const Run &run, Member &me, i64 step, i64 layer) {
  const Layer &parts = run.images.layout->layer;
  const Layout &layout = *run.images.layout;
  const unsigned char *base = run.images.packed + layout.first_layer + layer * layout.layer_bytes;
  const i64 narrow = run.space.width_stride, wide = run.space.wide_stride;
  const auto some = [&](Part part, const Linear &linear, const Rows &rows) {
    const i64 panels = panels_of(linear);
    product(linear, part.first(panels), part.last(panels), base, rows, run.room);
  };
  next_phase(me, [&](Part part) {
    const i64 first = part.first(heads(run.shape)), last = part.last(heads(run.shape));
    normalise_rows(run, parts.attention_norm, base);
    project_heads(run, base, first, last);
    attend(run, step, layer, first, last);
  });
  next_phase(me, [&](Part part) { some(part, parts.proj, Rows{run.attended, narrow, run.h, narrow, run.rows, true}); });
  next_phase(me, [&](Part part) {
    normalise_rows(run, parts.mlp_norm, base);
    some(part, parts.expand, Rows{run.normed, narrow, run.wide, wide, run.rows, false});
    const i64 first = part.first(panels_of(parts.expand)) * PANEL, last = part.last(panels_of(parts.expand)) * PANEL;
    for (i64 row = 0; row < run.rows; ++row)
      for (i64 i = first; i < last; i += LANES)
        store(run.wide + row * wide + i, gelu(load(run.wide + row * wide + i)));
  });
  next_phase(me, [&](Part part) { some(part, parts.contract, Rows{run.wide, wide, run.h, narrow, run.rows, true}); });
}

/// x_{i+1} = z_{i+1} exp(a) + b of each image.
void transform(const Run &run, i64 step) {
  const Images &images = run.images;
  const i64 values = run.shape.values, patches = run.shape.patches, stride = run.space.out_stride;
  product(images.layout->proj_out, images.packed, Rows{run.h, run.space.width_stride, run.out, stride, run.rows, false},
          run.room);
  for (i64 image = 0; image < images.count; ++image) {
    const i64 at = (image * patches + step + 1) * values;
    const float *first = run.out + image * stride, *second = first + (images.branches - 1) * images.count * stride;
    const float *guidance = images.branches == 1 ? nullptr : images.guidance + image * 2 * patches + step;
    float *x = run.x + image * run.space.value_stride;
    __builtin_memcpy(run.z, images.noise + at, static_cast<size_t>(values) * 4);
    const auto mixed = [&](i64 i, i64 kind) {
      const Floats own = load(first + i);
      return guidance == nullptr ? own : fma(broadcast(guidance[kind * patches]), own - load(second + i), own);
    };
    for (i64 i = 0; i < values; i += LANES) {
      const Floats z = load(run.z + i);
      store(x + i, run.shape.nvp ? fma(z, exp(mixed(i, 0)), mixed(values + i, 1)) : z + mixed(i, 1));
    }
    for (i64 i = values; i < round_up(values, LANES); ++i) x[i] = 0.0F;
    __builtin_memcpy(images.x + at, x, static_cast<size_t>(values) * 4);
  }
}

/// x = z, of which x_0 is the first input.
void begin(const Run &run) {
  const Images &images = run.images;
  const i64 values = run.shape.values, image_values = run.shape.patches * values;
  __builtin_memset(images.workspace, 0, static_cast<size_t>(run.space.cleared));
  if (images.x != images.noise)
    __builtin_memcpy(images.x, images.noise, static_cast<size_t>(images.count * image_values) * 4);
  for (i64 image = 0; image < images.count; ++image)
    __builtin_memcpy(run.x + image * run.space.value_stride, images.noise + image * image_values,
                     static_cast<size_t>(values) * 4);
}

/// All steps, as one thread of the team or the only one. Whether they ran to their end.
bool invert(const Images &images, i64 member) {
  Member me{images.team, member, 0};
  const Run run = run_of(images, member);
  if (me.is_leader()) begin(run);
  for (i64 step = 0; step < images.steps; ++step) {
    if (me.is_leader()) {
      if (images.cancel && __atomic_load_n(images.cancel, __ATOMIC_RELAXED)) return false;
      embed(run, step);
    }
    for (i64 layer = 0; layer < run.shape.layers; ++layer) run_layer(run, me, step, layer);
    if (is_dismissed(me)) return false;
    if (!me.is_leader()) continue;
    transform(run, step);
    if (images.progress) __atomic_fetch_add(images.progress, images.count, __ATOMIC_RELAXED);
  }
  return true;
}

} // namespace
} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

namespace tarflow_native {

#if defined(TARFLOW_NATIVE_PORTABLE) && defined(__wasm__)
const Kernel PORTABLE = {"wasm", portable::invert, portable::forward};
#elif defined(TARFLOW_NATIVE_PORTABLE)
const Kernel PORTABLE = {"portable", portable::invert, portable::forward};
#elif defined(__AVX512VNNI__)
const Kernel X86_64_V4_VNNI = {"x86-64-v4-vnni", x86_64_v4_vnni::invert, x86_64_v4_vnni::forward};
#elif defined(__AVX512F__)
const Kernel X86_64_V4 = {"x86-64-v4", x86_64_v4::invert, x86_64_v4::forward};
#elif defined(__AVX2__) && defined(__FMA__)
const Kernel X86_64_V3 = {"x86-64-v3", x86_64_v3::invert, x86_64_v3::forward};
#elif defined(__aarch64__)
const Kernel AARCH64 = {"aarch64", aarch64::invert, aarch64::forward};
#endif

} // namespace tarflow_native

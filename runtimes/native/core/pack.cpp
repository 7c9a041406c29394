#include "pack.hpp"

namespace tarflow_native {
namespace {

/// A name of the bundle, "attn_blocks.LAYER.REST" or "REST" (layer -1), "+ SUFFIX"; compared without being built.
struct Name {
  i64 layer;
  const char *rest, *suffix;
};

/// The text after `prefix`, or null where `text` does not begin with it.
const char *after(const char *text, const char *prefix) {
  while (*prefix) {
    if (*text != *prefix) return nullptr;
    ++text, ++prefix;
  }
  return text;
}

bool matches(const char *text, const Name &name) {
  if (name.layer >= 0) {
    text = after(text, "attn_blocks.");
    if (!text || *text < '0' || *text > '9' || (*text == '0' && text[1] != '.')) return false;
    i64 layer = 0;
    for (; *text >= '0' && *text <= '9' && layer <= name.layer; ++text) layer = layer * 10 + (*text - '0');
    if (layer != name.layer || *text++ != '.') return false;
  }
  text = after(text, name.rest);
  return text && same(text, name.suffix);
}

enum class Dtype { float32, bfloat16, uint8, int64 };
constexpr const char *DTYPE_NAMES[] = {"float32", "bfloat16", "uint8", "int64"};
constexpr i64 DTYPE_BYTES[] = {4, 2, 1, 8};

/// The contents of a tensor of a known dtype.
struct Contents {
  const unsigned char *bytes;
  Dtype dtype;

  float real(i64 index) const {
    uint32_t word;
    if (dtype == Dtype::float32) {
      __builtin_memcpy(&word, bytes + index * 4, 4);
    } else {
      uint16_t upper;
      __builtin_memcpy(&upper, bytes + index * 2, 2);
      word = static_cast<uint32_t>(upper) << 16;
    }
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
  }
  i64 integer(i64 index) const {
    i64 value;
    __builtin_memcpy(&value, bytes + index * 8, 8);
    return value;
  }
};

/// Packs one block; the first fault ends it.
class Packer {
public:
  Packer(const Shape &shape, Format format, const Weights &weights, unsigned char *packed, const char **culprit)
      : shape_(shape), format_(format), weights_(weights), packed_(packed), layout_(layout_of(shape, format)),
        culprit_(culprit) {}

  tarflow_native_status run() {
    __builtin_memset(packed_, 0, static_cast<size_t>(layout_.bytes));
    const i64 width = shape_.width;
    embeddings();
    linear(layout_.proj_in, -1, "proj_in", packed_, Fold{});
    for (i64 layer = 0; layer < shape_.layers && status_ == TARFLOW_NATIVE_OK; ++layer) {
      unsigned char *base = packed_ + layout_.first_layer + layer * layout_.layer_bytes;
      const Layer &parts = layout_.layer;
      Fold fold = norm(parts.attention_norm, layer, "attention.norm", base);
      fold.scaled = format_ == Format::float32 ? width : 0;
      linear(parts.qkv, layer, "attention.qkv", base, fold);
      linear(parts.proj, layer, "attention.proj", base, Fold{});
      fold = norm(parts.mlp_norm, layer, "mlp.norm", base);
      linear(parts.expand, layer, "mlp.main.0", base, fold);
      linear(parts.contract, layer, "mlp.main.2", base, Fold{});
    }
    linear(layout_.proj_out, -1, "proj_out", packed_, Fold{});
    if (status_ == TARFLOW_NATIVE_OK) {
      Header header{{}, TARFLOW_NATIVE_ABI, shape_, static_cast<i64>(format_), layout_.bytes};
      __builtin_memcpy(header.magic, MAGIC, sizeof MAGIC);
      __builtin_memcpy(packed_, &header, sizeof header);
    }
    return status_;
  }

private:
  /// What is folded into a linear layer, in float64: gamma and beta of the norm before it, and 1/sqrt(E) into its first
  /// `scaled` outputs.
  ///
  ///     W (gamma n + beta) + b = (W gamma) n + (b + W beta)
  struct Fold {
    Contents gamma{nullptr, Dtype::float32}, beta{nullptr, Dtype::float32};
    i64 scaled = 0;
  };

  void fail(tarflow_native_status status, const char *name) {
    if (status_ != TARFLOW_NATIVE_OK) return;
    status_ = status;
    if (culprit_) *culprit_ = name;
  }

  /// Finds a tensor and checks it; its bytes are null where it is at fault.
  Contents find(const Name &name, Dtype dtype, i64 rank, i64 first, i64 second = 1, i64 third = 1) {
    const i64 axes[] = {first, second, third};
    for (i64 i = 0; i < weights_.count; ++i) {
      const tarflow_native_tensor &tensor = weights_.tensors[i];
      if (!tensor.name || !matches(tensor.name, name)) continue;
      const i64 bytes = first * second * third * DTYPE_BYTES[static_cast<int>(dtype)];
      bool fits = tensor.dtype && same(tensor.dtype, DTYPE_NAMES[static_cast<int>(dtype)]) && tensor.rank == rank &&
                  tensor.shape && tensor.offset >= 0 && bytes <= weights_.size &&
                  tensor.offset <= weights_.size - bytes;
      for (i64 axis = 0; fits && axis < rank; ++axis) fits = tensor.shape[axis] == axes[axis];
      if (fits) return Contents{weights_.bytes + tensor.offset, dtype};
      break;
    }
    fail(TARFLOW_NATIVE_BAD_TENSOR, name.rest);
    return Contents{nullptr, dtype};
  }

  float *floats(unsigned char *base, i64 offset) { return reinterpret_cast<float *>(base + offset); }

  /// pos_embed in the order of the block, class_embed as it is.
  void embeddings() {
    const i64 patches = shape_.patches, width = shape_.width, stride = round_up(width, PANEL);
    const Contents order = find({-1, "order", ""}, Dtype::int64, 1, patches);
    const Contents places = find({-1, "pos_embed", ""}, Dtype::float32, 2, patches, width);
    if (!order.bytes || !places.bytes) return;
    const bool reversed = order.integer(0) != 0;
    for (i64 i = 0; i < patches; ++i) {
      const i64 place = reversed ? patches - 1 - i : i;
      if (order.integer(i) != place) return fail(TARFLOW_NATIVE_BAD_ORDER, "order");
      __builtin_memcpy(floats(packed_, layout_.pos_embed) + i * stride, places.bytes + place * width * 4,
                       static_cast<size_t>(width) * 4);
    }
    if (!shape_.classes) return;
    const Contents classes = find({-1, "class_embed", ""}, Dtype::float32, 2, shape_.classes + 1, width);
    for (i64 i = 0; classes.bytes && i <= shape_.classes; ++i)
      __builtin_memcpy(floats(packed_, layout_.class_embed) + i * stride, classes.bytes + i * width * 4,
                       static_cast<size_t>(width) * 4);
  }

  /// Keeps gamma and beta beside the layer, or returns them to be folded.
  Fold norm(const Norm &norm, i64 layer, const char *rest, unsigned char *base) {
    Fold fold{find({layer, rest, ".weight"}, Dtype::float32, 1, shape_.width),
              find({layer, rest, ".bias"}, Dtype::float32, 1, shape_.width)};
    if (!fold.gamma.bytes || !fold.beta.bytes) return Fold{};
    if (format_ == Format::float32) return fold;
    __builtin_memcpy(floats(base, norm.gamma), fold.gamma.bytes, static_cast<size_t>(shape_.width) * 4);
    __builtin_memcpy(floats(base, norm.beta), fold.beta.bytes, static_cast<size_t>(shape_.width) * 4);
    return Fold{};
  }

  void linear(const Linear &linear, i64 layer, const char *rest, unsigned char *base, const Fold &fold) {
    const Dtype dtype = format_ == Format::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
    const Contents bias = find({layer, rest, ".bias"}, dtype, 1, linear.outputs);
    if (!bias.bytes) return;
    for (i64 n = 0; n < linear.outputs; ++n) floats(base, linear.bias)[n] = bias.real(n);
    if (linear.format == Format::int8) return integers(linear, layer, rest, base);
    const Contents weight = find({layer, rest, ".weight"}, dtype, 2, linear.outputs, linear.inputs);
    if (!weight.bytes) return;
    if (linear.format == Format::bfloat16)
      halves(linear, weight, base);
    else
      singles(linear, weight, base, fold);
  }

  /// float32: panel [inputs][32], with what is folded in.
  void singles(const Linear &linear, const Contents &weight, unsigned char *base, const Fold &fold) {
    const double root = 1.0 / __builtin_sqrt(static_cast<double>(shape_.head_dim));
    for (i64 n = 0; n < linear.outputs; ++n) {
      float *to = floats(base, linear.panels) + n / PANEL * PANEL * linear.inputs + n % PANEL;
      float *bias = floats(base, linear.bias) + n;
      const double scale = n < fold.scaled ? root : 1.0;
      double shift = *bias;
      for (i64 k = 0; k < linear.inputs; ++k) {
        const double w = weight.real(n * linear.inputs + k);
        if (fold.gamma.bytes) {
          to[k * PANEL] = static_cast<float>(w * fold.gamma.real(k) * scale);
          shift += w * fold.beta.real(k);
        } else {
          to[k * PANEL] = static_cast<float>(w * scale);
        }
      }
      *bias = static_cast<float>(shift * scale);
    }
  }

  /// bfloat16: words [inputs][16] of outputs c and c + 16.
  void halves(const Linear &linear, const Contents &weight, unsigned char *base) {
    for (i64 n = 0; n < linear.outputs; ++n) {
      unsigned char *panel = base + linear.panels + n / PANEL * panel_bytes(Format::bfloat16, linear.inputs);
      for (i64 k = 0; k < linear.inputs; ++k)
        __builtin_memcpy(panel + (k * LANES + n % LANES) * 4 + n % PANEL / LANES * 2,
                         weight.bytes + (n * linear.inputs + k) * 2, 2);
    }
  }

  /// int8: words [inputs / 4][2][16] of four inputs, as they are stored: q + 128; scales [groups][32] a panel.
  void integers(const Linear &linear, i64 layer, const char *rest, unsigned char *base) {
    const i64 groups = round_up(linear.inputs, SCALE_GROUP) / SCALE_GROUP;
    const Contents q = find({layer, rest, ".weight.int8"}, Dtype::uint8, 3, linear.outputs, groups, SCALE_GROUP);
    const Contents scale = find({layer, rest, ".weight.scale"}, Dtype::float32, 2, linear.outputs, groups);
    if (!q.bytes || !scale.bytes) return;
    for (i64 n = 0; n < linear.outputs; ++n) {
      unsigned char *panel = base + linear.panels + n / PANEL * panel_bytes(Format::int8, linear.inputs);
      const unsigned char *from = q.bytes + n * groups * SCALE_GROUP;
      for (i64 k = 0; k < linear.inputs; ++k)
        panel[(k / 4 * PANEL + n % PANEL) * 4 + k % 4] = from[k];
      for (i64 g = 0; g < groups; ++g)
        floats(base, linear.scales)[(n / PANEL * groups + g) * PANEL + n % PANEL] = scale.real(n * groups + g);
    }
  }

  const Shape &shape_;
  const Format format_;
  const Weights &weights_;
  unsigned char *packed_;
  const Layout layout_;
  const char **culprit_;
  tarflow_native_status status_ = TARFLOW_NATIVE_OK;
};

} // namespace

tarflow_native_status pack(const Shape &shape, Format format, const Weights &weights, unsigned char *packed,
                           const char **culprit) {
  return Packer(shape, format, weights, packed, culprit).run();
}

} // namespace tarflow_native

#include "bundle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "manifest_fields.hpp"

namespace tarflow::detail {
namespace {

// Of blocks * layers * patches^2 * width, and of an image's values: the engine's counts of bytes then fit 64 bits, also
// for 4096 processors and 2^31 images.
constexpr double kLargestModel = 0x1p44;
constexpr std::int64_t kLargestImage = std::int64_t{1} << 31;
constexpr std::int64_t kMostLayers = 4096;  // two caches each
constexpr std::int64_t kAlignment = 64;  // of a tensor in weights.bin

Json parse(const std::string& root, const std::string& raw) {
  Json data;
  const auto refuse = [&](const std::string& why) {
    return bundle_problem(root, "manifest.json is not UTF-8 JSON: " + why);
  };
  if (raw.compare(0, 3, "\xef\xbb\xbf") == 0) throw refuse("it starts with a byte order mark");
  try {
    data = Json::parse(raw);
  } catch (const Json::exception& error) {
    throw refuse(error.what());
  }
  if (!data.is_object()) throw bundle_problem(root, "manifest.json must hold one JSON object");
  return data;
}

void check_version(const Fields& manifest) {
  if (manifest.text("format") != "tarflow-bundle") throw manifest.error("format", "must be 'tarflow-bundle'");
  const std::int64_t version = manifest.integer("schema_version");
  if (version != 2)
    throw bundle_problem(manifest.root,
                         "its schema_version is " + std::to_string(version) + ", this libtarflow reads 2",
                         version > 2 ? "upgrade libtarflow"
                                     : "make a new one: tarflow-export CHECKPOINT -o NAME.tarflow --overwrite");
}

std::vector<std::string> read_labels(const Fields& fields, std::int64_t classes) {
  std::vector<std::string> labels;
  if (!fields.has("labels")) return labels;
  for (const Json& label : fields.list("labels")) {
    if (!label.is_string()) throw fields.error("labels", "must be a list of names or null");
    labels.push_back(label.get<std::string>());
  }
  const std::set<std::string> different(labels.begin(), labels.end());
  if (static_cast<std::int64_t>(labels.size()) != classes || different.size() != labels.size())
    throw fields.error("labels", "must be " + std::to_string(classes) + " different names");
  return labels;
}

Config read_config(const Fields& fields, bool is_tokens) {
  Config c{};
  c.is_tokens = is_tokens;
  if (is_tokens) {
    c.patches = fields.count("tokens", 2);
    c.patch_values = fields.count("token_values");
  } else {
    c.image_size = fields.count("image_size");
    c.image_channels = fields.count("image_channels");
    c.patch_size = fields.count("patch_size");
    if (c.image_size % c.patch_size != 0 || c.image_size == c.patch_size)
      throw fields.error("patch_size", "does not cut the image into two patches or more");
    c.patches = (c.image_size / c.patch_size) * (c.image_size / c.patch_size);
    c.patch_values = c.image_channels * c.patch_size * c.patch_size;
  }
  c.width = fields.count("width");
  c.blocks = fields.count("blocks");
  c.layers = fields.count("layers", 1, kMostLayers);
  c.head_dim = fields.count("head_dim");
  if (c.width % c.head_dim != 0) throw fields.error("head_dim", "does not divide the width");
  const auto patches = static_cast<double>(c.patches);
  const double size = static_cast<double>(c.blocks * c.layers) * patches * patches * static_cast<double>(c.width);
  if (size > kLargestModel || c.patch_values > kLargestImage / c.patches)
    throw fields.error("width", "or another size is too large");
  c.classes = fields.count("classes", 0);
  c.nvp = fields.boolean("nvp");
  c.noise = fields.choice("noise", {"gaussian", "uniform"});
  if (fields.has("noise_std")) {
    c.noise_std = fields.number("noise_std");
    if (!std::isfinite(c.noise_std) || c.noise_std <= 0.0) throw fields.error("noise_std", "must be positive");
  }
  c.labels = read_labels(fields, c.classes);
  return c;
}

Files read_files(const Fields& fields, bool verify_digests) {
  Files files;
  for (const auto& item : fields.data.items()) {
    const Fields entry = fields.child(item.key());
    const std::int64_t size = entry.count("size", 0, INT64_MAX);
    std::string sha256 = entry.text("sha256");
    for (char& c : sha256) c = c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c;
    const File file{confined(fields.root, item.key()), size, sha256};
    check_file(fields.root, item.key(), file, verify_digests);
    files[item.key()] = file;
  }
  check_unlisted(fields.root, files);
  return files;
}

const File& file_of(const Fields& fields, const std::string& name, const Files& files) {
  const std::string path = fields.text(name);
  const auto found = files.find(path);
  if (found != files.end()) return found->second;
  confined(fields.root, path);  // an unsafe path is the worse fault: name it first
  throw fields.error(name, "names '" + path + "', which is not in the list of files");
}

void check_cache(const Fields& fields, const Config& config, const std::string& dtype) {
  const std::pair<const char*, std::int64_t> expected[] = {{"layers", config.layers},
                                                           {"heads", config.heads()},
                                                           {"patches", config.patches},
                                                           {"head_dim", config.head_dim}};
  for (const auto& [name, value] : expected) {
    if (fields.integer(name) != value)
      throw fields.error(name, "contradicts config: expected " + std::to_string(value));
  }
  if (fields.list("layout") != Json({"R", "H", "N", "E"})) throw fields.error("layout", "must be R, H, N, E");
  if (fields.text("dtype") != dtype) throw fields.error("dtype", "contradicts the precision: expected " + dtype);
}

// ---- the tensors ----

std::int64_t size_of(const std::string& dtype) {
  return dtype == "int64" ? 8 : dtype == "float32" ? 4 : dtype == "uint8" ? 1 : 2;
}

/// A tensor that lies within `size` bytes, and takes as many as its dtype and shape say.
Tensor read_tensor(const Fields& fields, std::int64_t size) {
  Tensor tensor{fields.choice("dtype", {"float32", "float16", "bfloat16", "int64", "uint8"}), {}, 0, 0};
  std::int64_t bytes = size_of(tensor.dtype);
  for (const Json& length : fields.list("shape")) {
    if (!length.is_number_integer()) throw fields.error("shape", "must be a list of integers");
    tensor.shape.push_back(length.get<std::int64_t>());
    if (tensor.shape.back() < 1 || tensor.shape.back() > size / bytes)
      throw fields.error("shape", "does not fit into the weights");
    bytes *= tensor.shape.back();
  }
  tensor.offset = fields.count("offset", 0, size);
  tensor.bytes = fields.count("bytes", 0, size);
  if (tensor.bytes != bytes)
    throw fields.error("bytes", "must be " + std::to_string(bytes) + " for its dtype and shape");
  if (tensor.offset % kAlignment != 0 || tensor.bytes > size - tensor.offset)
    throw fields.error("offset", "must be a multiple of 64 within the weights of every block");
  return tensor;
}

std::map<std::string, Tensor> read_tensors(const Fields& fields, const Config& config,
                                           const std::vector<Block>& blocks) {
  std::int64_t size = INT64_MAX;
  for (const Block& block : blocks) size = std::min(size, block.bytes);
  std::map<std::string, Tensor> tensors;
  for (const auto& item : fields.data.items()) tensors[item.key()] = read_tensor(fields.child(item.key()), size);
  const auto need = [&](const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw fields.error(name, "is missing");
    if (found->second.dtype != dtype || found->second.shape != shape)
      throw fields.error(name, "must be " + dtype + " " + Json(shape).dump());
  };
  need("pos_embed", "float32", {config.patches, config.width});
  if (config.classes != 0) need("class_embed", "float32", {config.classes + 1, config.width});
  need("order", "int64", {config.patches});
  return tensors;
}

// ---- the graphs ----

/// What libtarflow binds to a graph and reads from it: the tables of docs/BUNDLE.md, all of them but what vjp_forward
/// hands to vjp_backward.
struct Signature {
  std::vector<Array> inputs, outputs;
};

std::map<std::string, Signature> signatures(const Config& c, const std::string& cache_dtype) {
  const auto number = [](std::int64_t value) { return std::to_string(value); };
  const std::vector<std::string> whole = {"B", number(c.patches), number(c.patch_values)};
  const Array patches{"patches", "float32", whole}, cotangent{"cotangent", "float32", whole},
      z{"z", "float32", whole}, log_det{"log_det", "float32", {"B"}}, gradient{"gradient", "float32", whole};
  std::vector<Array> labels;
  if (c.classes != 0) labels.push_back({"labels", "int64", {"B"}});
  const auto with_labels = [&](std::vector<Array> arrays) {
    arrays.insert(arrays.end(), labels.begin(), labels.end());
    return arrays;
  };
  Signature step{{{"rows", "float32", {"R", number(c.patch_values)}},
                  {"embedding", "float32", {"R", number(c.width)}},
                  {"z", "float32", {"B", number(c.patch_values)}},
                  {"lengths", "int32", {"R"}},
                  {"total", "int32", {"1"}}},
                 {{"next", "float32", {"B", number(c.patch_values)}}}};
  const std::vector<std::string> cache_shape = {"R", number(c.heads()), number(c.patches), number(c.head_dim)};
  for (std::int64_t layer = 0; layer < c.layers; ++layer) {
    for (const char* kind : {"key_", "value_"}) {
      const Array cache{kind + number(layer), cache_dtype, cache_shape};
      step.inputs.push_back(cache);
      step.outputs.push_back({"next_" + cache.name, cache.dtype, cache.shape});
    }
  }
  Signature guided = step;
  guided.inputs.push_back({"g", "float32", {"B", number(c.nvp ? 2 * c.patch_values : c.patch_values)}});
  Signature tempered = guided;
  tempered.inputs.push_back({"query_factor", cache_dtype, {"R", number(3 * c.width)}});
  return {{"forward", {with_labels({patches}), {z, log_det}}},
          {"gradient", {with_labels({patches, cotangent}), {gradient}}},
          {"step", step},
          {"step_guided", guided},
          {"step_tempered", tempered},
          {"vjp_forward", {with_labels({patches}), {z, log_det}}},
          {"vjp_backward", {{cotangent}, {gradient}}}};
}

std::vector<Array> read_arrays(const Fields& graph, const std::string& name) {
  std::vector<Array> arrays;
  for (const Fields& fields : graph.objects(name)) {
    Array array{fields.text("name"), fields.text("dtype"), {}};
    for (const Json& axis : fields.list("shape")) {
      if (!axis.is_string() && !axis.is_number_integer())
        throw fields.error("shape", "must be a list of numbers and letters");
      array.shape.push_back(axis.is_string() ? axis.get<std::string>() : axis.dump());
    }
    arrays.push_back(std::move(array));
  }
  std::sort(arrays.begin(), arrays.end(), [](const Array& a, const Array& b) { return a.name < b.name; });
  return arrays;
}

/// Refuses arrays that are not the expected ones; `more` says whether there may be others beside them.
void check_arrays(const Fields& graph, const std::string& list, const std::vector<Array>& found,
                  const std::vector<Array>& expected, bool more) {
  for (const Array& array : expected) {
    if (std::count(found.begin(), found.end(), array) != 1)
      throw graph.error(list, "must have " + array.name + ", " + array.dtype + " " + Json(array.shape).dump());
  }
  if (!more && found.size() != expected.size())
    throw graph.error(list, "must be " + std::to_string(expected.size()) + ", got " + std::to_string(found.size()));
}

/// The bytes of a graph, compared with the digest again: they are what ONNX Runtime will be given.
std::shared_ptr<const std::string> read_graph(const std::string& root, const File& file, bool verify_digests) {
  auto bytes = std::make_shared<const std::string>(read_file(file.path));
  if (verify_digests && sha256_of(*bytes) != file.sha256)
    throw bundle_problem(root, "file " + file.path.substr(root.size() + 1) + " changed while it was read");
  return bytes;
}

/// The graphs that libtarflow runs. The portable ones lie beside every block, the same bytes each time.
std::map<std::string, Graph> read_graphs(const Fields& manifest, const Bundle& bundle, const Files& files,
                                         bool verify_digests) {
  const Fields graphs = manifest.child("graphs"), portable = graphs.child("portable"), fast = graphs.child("ort-cpu");
  const std::vector<Fields> blocks = manifest.objects("blocks");
  std::map<std::string, Graph> made;
  for (const auto& [kind, signature] : signatures(bundle.config, bundle.cache_dtype())) {
    const bool is_portable = kind == "forward" || kind == "gradient";
    const Fields fields = (is_portable ? portable : fast).child(kind);
    const File& file = is_portable ? file_of(blocks.front(), kind, files) : file_of(fields, "file", files);
    Graph graph{(is_portable ? "portable/" : "ort-cpu/") + kind, read_graph(manifest.root, file, verify_digests),
                read_arrays(fields, "inputs"), read_arrays(fields, "outputs")};
    check_arrays(fields, "inputs", graph.inputs, signature.inputs, kind == "vjp_backward");
    check_arrays(fields, "outputs", graph.outputs, signature.outputs, kind == "vjp_forward");
    for (const Fields& block : blocks) {
      if (is_portable && file_of(block, kind, files).sha256 != file.sha256)
        throw block.error(kind, "must be the same bytes in every block");
    }
    made.emplace(kind, std::move(graph));
  }
  std::vector<Array> kept = made.at("vjp_forward").outputs;
  kept.push_back({"cotangent", "float32", made.at("gradient").outputs.front().shape});
  for (const Array& array : made.at("vjp_backward").inputs) {
    if (std::find(kept.begin(), kept.end(), array) == kept.end())
      throw fast.child("vjp_backward").error("inputs", "has " + array.name + ", which vjp_forward does not give");
  }
  return made;
}

std::vector<Block> read_blocks(const Fields& manifest, const Config& config, const Files& files) {
  const auto folder_of = [](const File& file) { return file.path.substr(0, file.path.rfind('/')); };
  std::vector<Block> blocks;
  for (const Fields& fields : manifest.objects("blocks")) {
    const File& weights = file_of(fields, "weights", files);
    for (const char* kind : {"forward", "step", "gradient"}) {
      if (folder_of(file_of(fields, kind, files)) != folder_of(weights))
        throw fields.error("weights", "must lie beside the graphs of its block");
    }
    const bool reversed = fields.choice("order", {"identity", "reversed"}) == "reversed";
    blocks.push_back({reversed, folder_of(weights), weights.path, weights.size});
  }
  if (static_cast<std::int64_t>(blocks.size()) != config.blocks)
    throw manifest.error("blocks", "must have " + std::to_string(config.blocks) + " entries, got " +
                                       std::to_string(blocks.size()));
  return blocks;
}

/// The .npy file of the prior: format version 1 to 3, little-endian float32 in C order.
std::vector<float> read_prior(const Fields& manifest, const Config& config, const Files& files) {
  if (!manifest.has("prior")) return {};
  const std::string bytes = read_file(file_of(manifest, "prior", files).path);
  const auto refuse = [&](const std::string& problem) { return bundle_problem(manifest.root, "prior " + problem); };
  if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) throw refuse("is not a NumPy array");
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(static_cast<unsigned char>(bytes[i])); };
  const bool wide = byte(6) >= 2;
  const std::size_t start = wide ? 12 : 10;
  const std::size_t length = byte(8) | byte(9) << 8 | (wide ? byte(10) << 16 | byte(11) << 24 : 0);
  if (length > bytes.size() - start) throw refuse("is not a NumPy array");
  std::string header = bytes.substr(start, length);
  header.erase(std::remove(header.begin(), header.end(), ' '), header.end());
  const std::string shape = std::to_string(config.patches) + "," + std::to_string(config.patch_values);
  if (header.find("'descr':'<f4'") == std::string::npos || header.find("'fortran_order':False") == std::string::npos ||
      header.find("'shape':(" + shape + ")") == std::string::npos ||
      bytes.size() - start - length != 4 * static_cast<std::size_t>(config.dims()))
    throw refuse("must be float32 [" + shape + "]");
  std::vector<float> prior(static_cast<std::size_t>(config.dims()));
  std::memcpy(prior.data(), bytes.data() + start + length, 4 * prior.size());
  for (const float variance : prior) {
    if (!std::isfinite(variance) || variance <= 0.0F) throw refuse("holds a variance that is not positive");
  }
  return prior;
}

}  // namespace

std::vector<float> Bundle::floats(const Block& block, const std::string& tensor) const {
  const Tensor& entry = tensors.at(tensor);
  std::vector<float> values(static_cast<std::size_t>(entry.bytes) / sizeof(float));
  std::memcpy(values.data(), MappedFile(block.weights).data() + entry.offset, static_cast<std::size_t>(entry.bytes));
  return values;
}

Bundle open_bundle(const std::string& path, bool verify_digests) {
  const std::string root = resolve_directory(path);
  const std::string raw = read_file(confined(root, "manifest.json"));
  const Json data = parse(root, raw);
  const Fields manifest{data, root, ""};
  check_version(manifest);
  Bundle bundle{};
  bundle.path = root;
  bundle.digest = sha256_of(raw);
  const bool is_tokens = manifest.choice("data", {"image", "tokens"}) == "tokens";
  bundle.config = read_config(manifest.child("config"), is_tokens);
  bundle.precision = manifest.choice("precision", {"float32", "float16", "bfloat16", "int8"});
  if (!is_tokens && manifest.list("image_range") != Json({-1.0, 1.0}))
    throw manifest.error("image_range", "is not [-1, 1]");
  check_cache(manifest.child("cache"), bundle.config, bundle.cache_dtype());
  const Files files = read_files(manifest.child("files"), verify_digests);
  bundle.blocks = read_blocks(manifest, bundle.config, files);
  bundle.tensors = read_tensors(manifest.child("tensors"), bundle.config, bundle.blocks);
  if (bundle.precision != "bfloat16") bundle.graphs = read_graphs(manifest, bundle, files, verify_digests);
  bundle.prior = read_prior(manifest, bundle.config, files);
  if (manifest.has("reference")) file_of(manifest, "reference", files);
  return bundle;
}

}  // namespace tarflow::detail

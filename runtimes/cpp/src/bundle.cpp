#include "bundle.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "error.hpp"
#include "sha256.hpp"

namespace tarflow::detail {
namespace {

using Json = nlohmann::json;

constexpr const char* kFetch = "export the checkpoint again, or fetch the bundle again";
constexpr const char* kUnsafe = "do not use this bundle; fetch it from its source";
constexpr std::int64_t kLargest = 1 << 20;  // of every number of the configuration
// Of blocks * layers * patches^2 * width, and of an image's values: the engine's counts of bytes then fit 64 bits, also
// for 4096 processors and 2^31 images.
constexpr double kLargestModel = 0x1p44;
constexpr std::int64_t kLargestImage = std::int64_t{1} << 31;

std::string name_of(const std::string& root) { return root.substr(root.rfind('/') + 1); }

/// A JSON object that is read field by field, with errors that name the field.
struct Fields {
  const Json& data;
  const std::string& root;
  std::string where;

  Error error(const std::string& name, const std::string& problem) const {
    return bundle_error("bundle " + name_of(root) + ": manifest.json: " + where + name + " " + problem, kFetch);
  }
  const Json& value(const std::string& name, bool (*is)(const Json&), const char* kind) const {
    const auto found = data.find(name);
    if (found == data.end()) throw error(name, "is missing");
    if (!is(*found)) throw error(name, std::string("must be of type ") + kind + ", got " + found->type_name());
    return *found;
  }
  bool has(const std::string& name) const { return data.contains(name) && !data.at(name).is_null(); }
  std::int64_t integer(const std::string& name) const {
    const Json& found = value(name, [](const Json& v) { return v.is_number_integer(); }, "integer");
    if (found.is_number_unsigned() && found.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
      throw error(name, "is too large");
    return found.get<std::int64_t>();
  }
  std::int64_t count(const std::string& name, std::int64_t minimum = 1, std::int64_t maximum = kLargest) const {
    const std::int64_t number = integer(name);
    if (number < minimum || number > maximum)
      throw error(name, "must be " + std::to_string(minimum) + " to " + std::to_string(maximum) + ", got " +
                            std::to_string(number));
    return number;
  }
  std::string text(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_string(); }, "string").get<std::string>();
  }
  std::string choice(const std::string& name, const std::string& one, const std::string& other) const {
    const std::string found = text(name);
    if (found != one && found != other) throw error(name, "must be " + one + " or " + other + ", got '" + found + "'");
    return found;
  }
  const Json& list(const std::string& name) const {
    return value(name, [](const Json& v) { return v.is_array(); }, "list");
  }
  Fields child(const std::string& name) const {
    return {value(name, [](const Json& v) { return v.is_object(); }, "object"), root, where + name + "."};
  }
};

/// The absolute path of the bundle's file `name`; refuses to leave the directory or to follow a link.
std::string confined(const std::string& root, const std::string& name) {
  const auto refuse = [&](const std::string& problem) {
    return bundle_error("bundle " + name_of(root) + ": path '" + name + "' " + problem, kUnsafe);
  };
  if (name.empty() || name.front() == '/' || name.find_first_of(std::string("\\:\0", 3)) != std::string::npos)
    throw refuse("is not a relative path with forward slashes");
  std::string here = root;
  struct stat status = {};
  for (std::size_t start = 0; start <= name.size();) {
    const std::size_t end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    if (part.empty() || part == "." || part == "..")
      throw refuse("leaves the bundle directory or is not in its plain form");
    here += "/" + part;
    if (lstat(here.c_str(), &status) != 0)
      throw bundle_error("bundle " + name_of(root) + ": file " + name + " is missing", kFetch);
    if (S_ISLNK(status.st_mode)) throw refuse("passes through a symbolic link");
    start = end + 1;
  }
  if (!S_ISREG(status.st_mode)) throw refuse("is not a regular file");
  return here;
}

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) throw bundle_error("cannot read " + path, kFetch);
  return bytes;
}

std::string digest_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> buffer(1 << 18);
  Sha256 hash;
  while (file) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    hash.update(buffer.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (!file.eof()) throw bundle_error("cannot read " + path, kFetch);
  return hash.finish();
}

using Files = std::map<std::string, std::string>;

Files check_files(const std::string& root, const Fields& fields, bool verify_digests) {
  Files paths;
  for (const auto& item : fields.data.items()) {
    const std::string& name = item.key();
    const Fields entry = fields.child(name);
    const std::int64_t size = entry.count("size", 0, INT64_MAX);
    std::string expected = entry.text("sha256");
    const std::string path = confined(root, name);
    struct stat status = {};
    if (stat(path.c_str(), &status) != 0)
      throw bundle_error("bundle " + name_of(root) + ": file " + name + " is missing", kFetch);
    if (status.st_size != size)
      throw bundle_error("bundle " + name_of(root) + ": file " + name + " has " + std::to_string(status.st_size) +
                             " bytes, the manifest says " + std::to_string(size),
                         kFetch);
    for (char& c : expected) c = c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c;
    if (verify_digests && digest_of(path) != expected)
      throw bundle_error("bundle " + name_of(root) + ": file " + name +
                             " is damaged: its SHA-256 differs from the manifest",
                         kFetch);
    paths[name] = path;
  }
  return paths;
}

std::string file_of(const Fields& fields, const std::string& name, const Files& files) {
  const std::string path = fields.text(name);
  const auto found = files.find(path);
  if (found != files.end()) return found->second;
  confined(fields.root, path);  // an unsafe path is the worse fault: name it first
  throw fields.error(name, "names '" + path + "', which is not in the list of files");
}

Config read_config(const Fields& fields) {
  Config c{};
  c.image_size = fields.count("image_size");
  c.image_channels = fields.count("image_channels");
  c.patch_size = fields.count("patch_size");
  c.width = fields.count("width");
  c.blocks = fields.count("blocks");
  c.layers = fields.count("layers");
  c.head_dim = fields.count("head_dim");
  c.classes = fields.count("classes", 0);
  c.nvp = fields.value("nvp", [](const Json& v) { return v.is_boolean(); }, "boolean").get<bool>();
  c.noise = fields.choice("noise", "gaussian", "uniform");
  if (fields.has("noise_std")) {
    c.noise_std = fields.value("noise_std", [](const Json& v) { return v.is_number(); }, "number").get<double>();
    if (!std::isfinite(c.noise_std) || c.noise_std <= 0.0) throw fields.error("noise_std", "must be positive");
  }
  if (c.image_size % c.patch_size != 0 || c.width % c.head_dim != 0 || c.patches() < 2)
    throw fields.error("patch_size", "or head_dim does not divide the image or the width");
  const auto patches = static_cast<double>(c.patches());
  const double size = static_cast<double>(c.blocks * c.layers) * patches * patches * static_cast<double>(c.width);
  if (size > kLargestModel || c.dims() > kLargestImage) throw fields.error("width", "or another size is too large");
  if (fields.has("labels")) {
    for (const Json& label : fields.list("labels")) {
      if (!label.is_string()) throw fields.error("labels", "must be a list of names or null");
      c.labels.push_back(label.get<std::string>());
    }
    const std::set<std::string> different(c.labels.begin(), c.labels.end());
    if (static_cast<std::int64_t>(c.labels.size()) != c.classes || different.size() != c.labels.size())
      throw fields.error("labels", "must be " + std::to_string(c.classes) + " different names");
  }
  return c;
}

bool read_cache(const Fields& fields, const Config& config) {
  const std::pair<const char*, std::int64_t> expected[] = {{"layers", config.layers},
                                                           {"heads", config.heads()},
                                                           {"patches", config.patches()},
                                                           {"head_dim", config.head_dim}};
  for (const auto& [name, value] : expected) {
    if (fields.integer(name) != value)
      throw fields.error(name, "contradicts config: expected " + std::to_string(value));
  }
  if (fields.list("layout") != Json({"R", "H", "N", "E"})) throw fields.error("layout", "must be R, H, N, E");
  return fields.choice("dtype", "float32", "float16") == "float16";
}

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::vector<Block> read_blocks(const Fields& manifest, const Config& config, const Files& files) {
  const Json& entries = manifest.list("blocks");
  if (static_cast<std::int64_t>(entries.size()) != config.blocks)
    throw manifest.error("blocks", "must have " + std::to_string(config.blocks) + " entries, got " +
                                       std::to_string(entries.size()));
  std::vector<Block> blocks;
  for (const Json& entry : entries) {
    const std::string where = "blocks[" + std::to_string(blocks.size()) + "]";
    if (!entry.is_object()) throw manifest.error(where, "must be an object");
    const Fields fields{entry, manifest.root, where + "."};
    Block block{fields.choice("order", "identity", "reversed") == "reversed", file_of(fields, "forward", files),
                file_of(fields, "step", files), file_of(fields, "gradient", files), file_of(fields, "weights", files)};
    for (const std::string* path : {&block.forward, &block.step, &block.gradient}) {
      if (folder_of(*path) != folder_of(block.weights))
        throw fields.error("weights", "must lie beside the graphs of its block");
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

/// The .npy file of the prior: format version 1 to 3, little-endian float32 in C order.
std::vector<float> read_prior(const Fields& manifest, const Config& config, const Files& files) {
  if (!manifest.has("prior")) return {};
  const std::string bytes = read_all(file_of(manifest, "prior", files));
  const auto refuse = [&](const std::string& problem) {
    return bundle_error("bundle " + name_of(manifest.root) + ": prior " + problem, kFetch);
  };
  const std::string shape = "must be float32 [" + std::to_string(config.patches()) + ", " +
                            std::to_string(config.patch_values()) + "]";
  if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) throw refuse("is not a NumPy array");
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(static_cast<unsigned char>(bytes[i])); };
  const bool wide = byte(6) >= 2;
  const std::size_t start = wide ? 12 : 10;
  const std::size_t length = byte(8) | byte(9) << 8 | (wide ? byte(10) << 16 | byte(11) << 24 : 0);
  if (length > bytes.size() - start) throw refuse("is not a NumPy array");
  std::string header = bytes.substr(start, length);
  header.erase(std::remove(header.begin(), header.end(), ' '), header.end());
  const std::string expected =
      "'shape':(" + std::to_string(config.patches()) + "," + std::to_string(config.patch_values()) + ")";
  if (header.find("'descr':'<f4'") == std::string::npos || header.find("'fortran_order':False") == std::string::npos ||
      header.find(expected) == std::string::npos ||
      bytes.size() - start - length != 4 * static_cast<std::size_t>(config.dims()))
    throw refuse(shape);
  std::vector<float> prior(static_cast<std::size_t>(config.dims()));
  std::memcpy(prior.data(), bytes.data() + start + length, 4 * prior.size());
  for (const float variance : prior) {
    if (!std::isfinite(variance) || variance <= 0.0F) throw refuse("holds a variance that is not positive");
  }
  return prior;
}

std::string resolve(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(realpath(path.c_str(), nullptr), &std::free);
  struct stat status = {};
  if (!real || stat(real.get(), &status) != 0)
    throw bundle_error("bundle " + path + ": no such directory", "check the path");
  if (!S_ISDIR(status.st_mode))
    throw bundle_error("bundle " + path + ": expected a directory, got a file", "name the NAME.tarflow directory");
  return real.get();
}

Json parse(const std::string& root, const std::string& raw) {
  Json data;
  const auto refuse = [&](const std::string& why) {
    return bundle_error("bundle " + name_of(root) + ": manifest.json is not UTF-8 JSON: " + why, kFetch);
  };
  if (raw.compare(0, 3, "\xef\xbb\xbf") == 0) throw refuse("it starts with a byte order mark");
  try {
    data = Json::parse(raw);
  } catch (const Json::exception& error) {
    throw refuse(error.what());
  }
  if (!data.is_object())
    throw bundle_error("bundle " + name_of(root) + ": manifest.json must hold one JSON object", kFetch);
  return data;
}

}  // namespace

Bundle open_bundle(const std::string& path, bool verify_digests) {
  const std::string root = resolve(path);
  const std::string raw = read_all(confined(root, "manifest.json"));
  const Json data = parse(root, raw);
  const Fields manifest{data, root, ""};
  if (manifest.text("format") != "tarflow-bundle") throw manifest.error("format", "must be 'tarflow-bundle'");
  const std::int64_t version = manifest.integer("schema_version");
  if (version != 1)
    throw bundle_error("bundle " + name_of(root) + " has schema_version " + std::to_string(version) +
                           ", this libtarflow reads 1",
                       version > 1 ? "upgrade libtarflow" : "export the checkpoint again");
  Bundle bundle{};
  bundle.path = root;
  bundle.config = read_config(manifest.child("config"));
  const Files files = check_files(root, manifest.child("files"), verify_digests);
  bundle.half = manifest.choice("dtype", "float32", "float16") == "float16";
  if (manifest.list("image_range") != Json({-1.0, 1.0})) throw manifest.error("image_range", "is not [-1, 1]");
  bundle.half_cache = read_cache(manifest.child("cache"), bundle.config);
  Sha256 hash;
  hash.update(raw.data(), raw.size());
  bundle.digest = hash.finish();
  bundle.blocks = read_blocks(manifest, bundle.config, files);
  bundle.prior = read_prior(manifest, bundle.config, files);
  if (manifest.has("reference")) file_of(manifest, "reference", files);
  return bundle;
}

}  // namespace tarflow::detail

// Damaged and unsafe bundles are refused: unit_bundle BUNDLE FOLDER, a folder to make spoilt copies in.
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "check.hpp"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

fs::path bundle, folder;

std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/// Opening a bundle must fail with these words in the message and these in the hint.
void check_refused(const fs::path& path, const char* words, const char* hint, bool skip_digests) {
  tarflow_model* model = nullptr;
  tarflow_model_options options;
  tarflow_model_options_init(&options);
  options.skip_digests = skip_digests ? 1 : 0;
  CHECK_FAILS(tarflow_model_open(path.c_str(), &options, &model), TARFLOW_ERROR_BUNDLE, words);
  CHECK(model == nullptr);
  CHECK(*tarflow_last_hint() != '\0' && std::strstr(tarflow_last_hint(), hint) != nullptr);
}

/// A copy of the bundle, spoilt, must be refused.
void refused(const char* words, const std::function<void(const fs::path&)>& spoil, const char* hint = "") {
  const fs::path copy = folder / "spoilt.tarflow";
  fs::remove_all(copy);
  fs::copy(bundle, copy, fs::copy_options::recursive);
  spoil(copy);
  check_refused(copy, words, hint, false);
  fs::remove_all(copy);
}

/// The same with another manifest; no digest is looked at, which would take most of the time.
void edited(const char* words, const std::function<void(Json&)>& edit, const char* hint = "") {
  const fs::path copy = folder / "edited.tarflow";
  if (!fs::exists(copy)) fs::copy(bundle, copy, fs::copy_options::recursive);
  Json manifest = Json::parse(text_of(bundle / "manifest.json"));
  edit(manifest);
  std::ofstream(copy / "manifest.json") << manifest;
  check_refused(copy, words, hint, true);
}

void changed(const char* words, const char* pointer, const Json& value, const char* hint = "") {
  edited(words, [&](Json& manifest) { manifest.at(Json::json_pointer(pointer)) = value; }, hint);
}

void added(const char* words, const char* file) {
  edited(words, [&](Json& manifest) { manifest["files"][file] = {{"size", 0}, {"sha256", ""}}; });
}

void flip(const fs::path& path) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  char byte = 0;
  file.seekg(1000).get(byte);
  file.seekp(1000).put(static_cast<char>(byte ^ 1));
}

void test_manifest() {
  changed("schema_version is 1", "/schema_version", 1, "tarflow-export CHECKPOINT -o NAME.tarflow --overwrite");
  changed("schema_version is 3", "/schema_version", 3, "upgrade");
  changed("format", "/format", "other-bundle");
  changed("data must be one of image, tokens, got 'audio'", "/data", "audio");
  changed("contradicts the precision: expected bfloat16", "/precision", "bfloat16");
  changed("contradicts the precision: expected float16", "/precision", "float16");
  changed("width must be of type integer, got boolean", "/config/width", true);
  changed("width must be 1 to", "/config/width", 99999999999);
  changed("too large", "/config/image_size", 262144);  // 2^32 patches
  changed("patch_size does not cut", "/config/patch_size", 5);
  changed("tokens must be of type integer", "/data", "tokens");
  changed("contradicts config", "/cache/heads", 4);
  changed("must have 4 entries, got 0", "/blocks", Json::array());
  changed("image_range", "/image_range", Json({0, 255}));
  refused("byte order mark", [](const fs::path& copy) {
    const std::string text = text_of(copy / "manifest.json");
    std::ofstream(copy / "manifest.json") << "\xef\xbb\xbf" << text;
  });
  refused("not UTF-8 JSON", [](const fs::path& copy) { std::ofstream(copy / "manifest.json") << "{\"a\": \xff}"; });
  refused("one JSON object", [](const fs::path& copy) { std::ofstream(copy / "manifest.json") << "[]"; });
  refused("manifest.json is missing", [](const fs::path& copy) { fs::remove(copy / "manifest.json"); });
}

void test_files() {
  changed("is not in the list of files", "/blocks/0/step", "manifest.json");
  changed("must lie beside", "/blocks/0/step", "block_01/step.onnx");
  added("leaves the bundle", "../x");
  added("relative path", "/x");
  added("file x is missing", "x");
  refused("holds block_00/.notes, which the manifest does not list",
          [](const fs::path& copy) { std::ofstream(copy / "block_00" / ".notes") << "x"; }, "remove it");
  refused("holds link, which", [](const fs::path& copy) { fs::create_directory_symlink("block_00", copy / "link"); });
  refused("holds gone, which", [](const fs::path& copy) { fs::create_symlink("nowhere", copy / "gone"); });
  refused("bytes, the manifest says", [](const fs::path& copy) {
    std::ofstream(copy / "block_00/weights.bin", std::ios::app) << 'x';
  });
  refused("weights.bin is damaged", [](const fs::path& copy) { flip(copy / "block_01/weights.bin"); });
  refused("step.onnx is damaged", [](const fs::path& copy) { flip(copy / "graphs/ort-cpu/step.onnx"); });
  refused("symbolic link", [](const fs::path& copy) {
    fs::rename(copy / "block_02", copy / "elsewhere");
    fs::create_directory_symlink("elsewhere", copy / "block_02");
  });
}

void test_tensors() {
  changed("pos_embed.offset must be a multiple of 64", "/tensors/pos_embed/offset", 1);
  changed("pos_embed.offset must be a multiple of 64 within", "/tensors/pos_embed/offset", 3228736 - 64);
  changed("pos_embed.offset must be 0 to", "/tensors/pos_embed/offset", INT64_MAX);
  changed("pos_embed.offset must be 0 to", "/tensors/pos_embed/offset", -64);
  changed("pos_embed.bytes must be 25088", "/tensors/pos_embed/bytes", 25087);
  changed("pos_embed.bytes must be 12544", "/tensors/pos_embed/dtype", "float16");
  changed("pos_embed.dtype must be one of", "/tensors/pos_embed/dtype", "float64");
  changed("pos_embed must be float32 [49,128]", "/tensors/pos_embed/shape", Json({128, 49}));
  changed("pos_embed.shape does not fit", "/tensors/pos_embed/shape", Json({1 << 30, 1 << 30, 1 << 30}));
  changed("pos_embed.shape does not fit", "/tensors/pos_embed/shape", Json({49, -128}));
  changed("pos_embed.shape must be a list of integers", "/tensors/pos_embed/shape", Json({"N", "W"}));
  for (const std::string name : {"pos_embed", "class_embed", "order"})
    edited(("tensors." + name + " is missing").c_str(), [&](Json& manifest) { manifest["tensors"].erase(name); });
}

void test_graphs() {
  edited("graphs.ort-cpu is missing", [](Json& manifest) { manifest["graphs"].erase("ort-cpu"); });
  for (const std::string kind : {"step", "step_guided", "step_tempered", "vjp_forward", "vjp_backward"})
    edited(("graphs.ort-cpu." + kind + " is missing").c_str(),
           [&](Json& manifest) { manifest["graphs"]["ort-cpu"].erase(kind); });
  changed("step_guided.inputs must have g, float32 [\"B\",\"32\"]", "/graphs/ort-cpu/step_guided/inputs/3/shape",
          Json({1, 32}));
  changed("forward.outputs must have z", "/graphs/portable/forward/outputs/0/shape", Json({"B", 49, 17}));
  changed("forward.outputs must have z", "/graphs/portable/forward/outputs/0/dtype", "float16");
  changed("inputs[0].shape must be", "/graphs/portable/forward/inputs/0/shape", Json({"B", 49, nullptr}));
  edited("inputs must be 2, got 3", [](Json& manifest) {
    Json& inputs = manifest["graphs"]["portable"]["forward"]["inputs"];
    inputs.push_back(inputs[0]);
    inputs[2]["name"] = "more";
  });
  changed("which vjp_forward does not give", "/graphs/ort-cpu/vjp_backward/inputs/1/name", "unknown");
  changed("must be the same bytes in every block", "/blocks/1/forward", "block_01/step.onnx");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  bundle = argv[1];
  folder = argv[2];
  fs::remove_all(folder / "edited.tarflow");
  return finish([] {
    test_manifest();
    test_files();
    test_tensors();
    test_graphs();
  });
}

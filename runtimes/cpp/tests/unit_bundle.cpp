// Damaged and unsafe bundles are refused: unit_bundle BUNDLE FOLDER, a folder to make spoilt copies in.
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "check.hpp"

namespace fs = std::filesystem;

static std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/// A copy of the bundle, spoilt, must be refused with these words in the message.
static void test_refused(const fs::path& bundle, const fs::path& folder) {
  const auto refused = [&](const char* words, const std::function<void(const fs::path&)>& spoil) {
    const fs::path copy = folder / "spoilt.tarflow";
    fs::remove_all(copy);
    fs::copy(bundle, copy, fs::copy_options::recursive);
    spoil(copy);
    tarflow_model* model = nullptr;
    CHECK_FAILS(tarflow_model_open(copy.c_str(), nullptr, &model), TARFLOW_ERROR_BUNDLE, words);
    CHECK(model == nullptr);
    CHECK(*tarflow_last_hint() != '\0');
    fs::remove_all(copy);
  };
  const auto edited = [&](const char* words, const std::string& from, const std::string& to) {
    refused(words, [&](const fs::path& copy) {
      std::string text = text_of(copy / "manifest.json");
      const std::size_t at = text.find(from);
      CHECK(at != std::string::npos);
      if (at == std::string::npos) return;
      std::ofstream(copy / "manifest.json") << text.replace(at, from.size(), to);
    });
  };
  edited("schema_version 2", "\"schema_version\": 1", "\"schema_version\": 2");
  edited("format", "tarflow-bundle", "other-bundle");
  edited("width must be of type integer, got boolean", "\"width\": 128", "\"width\": true");
  edited("width must be 1 to", "\"width\": 128", "\"width\": 99999999999");
  edited("too large", "\"image_size\": 28", "\"image_size\": 262144");  // 2^32 patches
  edited("is not in the list of files", "\"step\": \"block_00/step.onnx\"", "\"step\": \"manifest.json\"");
  edited("leaves the bundle", "\"files\": {", "\"files\": {\"../x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("relative path", "\"files\": {", "\"files\": {\"/x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("is missing", "\"files\": {", "\"files\": {\"x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("contradicts config", "\"heads\": 2", "\"heads\": 4");
  refused("byte order mark", [](const fs::path& copy) {
    const std::string text = text_of(copy / "manifest.json");
    std::ofstream(copy / "manifest.json") << "\xef\xbb\xbf" << text;
  });
  refused("not UTF-8 JSON", [](const fs::path& copy) { std::ofstream(copy / "manifest.json") << "{\"a\": \xff}"; });
  refused("one JSON object", [](const fs::path& copy) { std::ofstream(copy / "manifest.json") << "[]"; });
  refused("manifest.json is missing", [](const fs::path& copy) { fs::remove(copy / "manifest.json"); });
  refused("bytes, the manifest says", [](const fs::path& copy) {
    std::ofstream(copy / "block_00/weights.bin", std::ios::app) << 'x';
  });
  refused("SHA-256 differs", [](const fs::path& copy) {
    std::fstream file(copy / "block_01/weights.bin", std::ios::in | std::ios::out | std::ios::binary);
    char byte = 0;
    file.seekg(1000).get(byte);
    file.seekp(1000).put(static_cast<char>(byte ^ 1));
  });
  refused("symbolic link", [](const fs::path& copy) {
    fs::rename(copy / "block_02", copy / "elsewhere");
    fs::create_directory_symlink("elsewhere", copy / "block_02");
  });
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return finish([&] { test_refused(argv[1], argv[2]); });
}

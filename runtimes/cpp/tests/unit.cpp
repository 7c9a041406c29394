// Noise, SHA-256, bundle checks and the C ABI's errors: tarflow_unit BUNDLE FOLDER
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "noise.hpp"
#include "sha256.hpp"
#include "tarflow/tarflow.hpp"

namespace fs = std::filesystem;
using tarflow::detail::Words;

static int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++failures;                                                         \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

static std::string digest(const void* data, std::size_t size) {
  tarflow::detail::Sha256 hash;
  hash.update(data, size);
  return hash.finish();
}

static std::uint32_t bits(float value) {
  std::uint32_t word = 0;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

static void test_noise() {
  using tarflow::detail::philox;
  CHECK((philox({0, 0, 0, 0}, 0, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox({~0U, ~0U, ~0U, ~0U}, ~0U, ~0U) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0) ==
         Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  float nine[9];
  CHECK(tarflow_noise(0x0123456789abcdefULL, (1ULL << 32) + 5, 1, 3, 3, nine) == TARFLOW_OK);
  const std::uint32_t expected[] = {0x3ea2377b, 0xbf100ab7, 0x3de7df53, 0xbf327093, 0x400209bb,
                                    0x3fa8f1ec, 0x3eaffd42, 0xbc466731, 0x3ed456ea};
  for (int i = 0; i < 9; ++i) CHECK(bits(nine[i]) == expected[i]);
  std::vector<float> four(4 * 49 * 16);
  CHECK(tarflow_noise(7, 0, 4, 49, 16, four.data()) == TARFLOW_OK);
  CHECK(digest(four.data(), 4 * four.size()) == "450ea589e823a3e25e5aeddf0aaccacc5d11476f06ac8cde3ebd9ffb547633df");
}

static void test_sha256() {
  CHECK(digest("", 0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(digest("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string million(1000000, 'a');
  CHECK(digest(million.data(), million.size()) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

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
    CHECK(tarflow_model_open(copy.c_str(), nullptr, &model) == TARFLOW_ERROR_BUNDLE);
    CHECK(model == nullptr);
    if (std::strstr(tarflow_last_message(), words) == nullptr) {
      ++failures;
      std::fprintf(stderr, "expected '%s' in '%s'\n", words, tarflow_last_message());
    }
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
  edited("is not in the list of files", "\"step\": \"block_00/step.onnx\"", "\"step\": \"manifest.json\"");
  edited("leaves the bundle", "\"files\": {", "\"files\": {\"../x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("relative path", "\"files\": {", "\"files\": {\"/x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("is missing", "\"files\": {", "\"files\": {\"x\": {\"size\": 0, \"sha256\": \"\"}, ");
  edited("contradicts config", "\"heads\": 2", "\"heads\": 4");
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

static void test_arguments(const tarflow::Model& model) {
  tarflow_sampler* sampler = nullptr;
  CHECK(tarflow_sampler_create(nullptr, &sampler) == TARFLOW_ERROR_INPUT);
  CHECK(tarflow_sampler_create(model.get(), &sampler) == TARFLOW_OK);
  std::vector<float> images(model.dims());
  const auto sampled = [&](const std::function<void(tarflow_sample_options&)>& change, const int64_t* labels) {
    tarflow_sample_options options;
    tarflow_sample_options_init(&options);
    change(options);
    return tarflow_sampler_sample(sampler, 1, labels, &options, images.data(), images.size());
  };
  const int64_t wrong = 10;
  const int64_t null = -1;
  CHECK(sampled([](auto&) {}, &wrong) == TARFLOW_ERROR_INPUT);
  CHECK(std::strstr(tarflow_last_message(), "label 10") != nullptr);
  CHECK(sampled([](auto& o) { o.guidance = 1.0; }, &null) == TARFLOW_ERROR_INPUT);
  CHECK(std::strstr(tarflow_last_message(), "nothing to compare") != nullptr);
  CHECK(sampled([](auto& o) { o.guidance = -1.0; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.guidance = std::nan(""); }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.attention_temperature = 0.0; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.guide = 4; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.batch_size = -1; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.struct_size += 8; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(sampled([](auto& o) { o.struct_size = 0; }, nullptr) == TARFLOW_ERROR_INPUT);
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, nullptr, images.data(), 3) == TARFLOW_ERROR_INPUT);
  CHECK(tarflow_sampler_sample(sampler, 0, nullptr, nullptr, images.data(), 0) == TARFLOW_ERROR_INPUT);
  double log_prob = 0.0;
  images[5] = INFINITY;
  CHECK(tarflow_sampler_log_prob(sampler, 1, images.data(), nullptr, &log_prob) == TARFLOW_ERROR_INPUT);



  tarflow_model* second = nullptr;
  CHECK(tarflow_model_open("/nowhere.tarflow", nullptr, &second) == TARFLOW_ERROR_BUNDLE);
  CHECK(model.label(3) == "3");
  // A caller with an older, shorter struct: the fields that it lacks keep their defaults.
  tarflow_sample_options old;
  tarflow_sample_options_defaults(&old, offsetof(tarflow_sample_options, batch_size));
  old.batch_size = -5;
  CHECK(tarflow_sampler_sample(sampler, 1, nullptr, &old, images.data(), images.size()) == TARFLOW_OK);
  tarflow_sampler_free(sampler);
}

static void test_sampling(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  tarflow::SampleOptions options;
  options.seed = 3;
  int calls = 0;
  tarflow_step last{};
  options.on_step = [&](const tarflow_step& step) {
    ++calls;
    CHECK(step.step == calls);
    last = step;
    return true;
  };
  const std::vector<std::int64_t> labels = {0, 1, 2};
  const std::vector<float> images = sampler.sample(3, labels, options);
  CHECK(calls == 4 * 48 && last.total == calls && last.block == 0);

  calls = 0;
  options.on_step = [&](const tarflow_step&) { return ++calls < 5; };
  try {
    sampler.sample(3, labels, options);
    CHECK(false);
  } catch (const tarflow::Error& error) {
    CHECK(error.code() == TARFLOW_ERROR_CANCELLED);
  }
  CHECK(calls == 5);
  options.on_step = [](const tarflow_step&) -> bool { throw std::string("mine"); };
  try {
    sampler.sample(3, labels, options);
    CHECK(false);
  } catch (const std::string& thrown) {
    CHECK(thrown == "mine");
  }
  options.on_step = nullptr;
  CHECK(sampler.sample(3, labels, options) == images);  // cancelled runs left the sampler as it was

  // An image does not depend on its batch: image 2 alone, to rounding.
  options.first_index = 2;
  const std::vector<float> alone = sampler.sample(1, {2}, options);
  for (std::size_t i = 0; i < alone.size(); ++i) CHECK(std::fabs(alone[i] - images[2 * alone.size() + i]) < 1e-4F);
  options.first_index = 0;

  // Samplers of one model in several threads give what one gives.
  std::vector<std::vector<float>> results(3);
  std::vector<std::thread> threads;
  for (auto& result : results)
    threads.emplace_back([&] { result = tarflow::Sampler(model).sample(3, labels, options); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) CHECK(result == images);

  // Decoding inverts encoding.
  options.denoise = false;
  const std::vector<float> raw = sampler.sample(3, labels, options);
  tarflow::Encoded encoded = sampler.encode(raw, labels);
  options.seed = 0;
  options.noise = encoded.z;
  const std::vector<float> again = sampler.sample(3, labels, options);
  for (std::size_t i = 0; i < raw.size(); ++i) CHECK(std::fabs(again[i] - raw[i]) < 1e-3F);
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  test_noise();
  test_sha256();
  test_refused(argv[1], fs::path(argv[2]));
  tarflow::Model::Options options;
  options.ort_library = "/nowhere/libonnxruntime.so";
  try {
    tarflow::Model(argv[1], options);
    CHECK(false);
  } catch (const tarflow::Error& error) {
    CHECK(error.code() == TARFLOW_ERROR_ENGINE && !error.hint().empty());
  }
  try {
    const tarflow::Model model(argv[1]);
    test_arguments(model);
    test_sampling(model);
  } catch (const tarflow::Error& error) {
    std::fprintf(stderr, "%s (%s)\n", error.what(), error.hint().c_str());
    return 1;
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

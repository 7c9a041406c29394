// Fuzzes open_bundle: the manifest, and after a zero byte what lies in prior.npy. Every other file of the shipped
// bundle is there with its size but empty of content, so that changes of single fields go deep.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "bundle.hpp"
#include "error.hpp"

namespace fs = std::filesystem;

namespace {

void write(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

/// A bundle directory of this process, removed when it ends.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("tarflow_fuzz_" + std::to_string(getpid()) + ".tarflow")) {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(TARFLOW_BUNDLE)) {
      const fs::path copy = path_ / fs::relative(entry.path(), TARFLOW_BUNDLE);
      fs::create_directories(entry.is_directory() ? copy : copy.parent_path());
      if (entry.is_directory()) continue;
      write(copy, "");
      fs::resize_file(copy, entry.file_size());
    }
  }
  ~Folder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Folder folder;
  const std::string input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = input.find('\0');
  write(folder.path() / "manifest.json", input.substr(0, end));
  fs::remove(folder.path() / "prior.npy");  // where no manifest lists it, it is one file too many
  if (end != std::string::npos) write(folder.path() / "prior.npy", input.substr(end + 1));
  try {
    const tarflow::detail::Bundle bundle = tarflow::detail::open_bundle(folder.path(), false);
    // What is accepted must be of a size that products of its numbers can be taken of, with tensors inside the weights.
    const auto blocks = static_cast<std::int64_t>(bundle.blocks.size());
    if (bundle.config.dims() < 1 || blocks != bundle.config.blocks) std::abort();
    for (const tarflow::detail::Block& block : bundle.blocks) {
      const std::vector<float> rows = bundle.floats(block, "pos_embed");
      if (static_cast<std::int64_t>(rows.size()) != bundle.config.patches * bundle.config.width) std::abort();
    }
  } catch (const tarflow::detail::Error& error) {
    if (error.status != TARFLOW_ERROR_BUNDLE || error.hint.empty()) std::abort();
  }
  return 0;
}

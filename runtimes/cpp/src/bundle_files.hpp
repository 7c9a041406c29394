// The files of a bundle directory: those that the manifest lists, all of them and nothing else.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "error.hpp"

namespace tarflow::detail {

constexpr const char* kFetchAgain = "export the checkpoint again, or fetch the bundle again";

struct File {
  std::string path;  // absolute
  std::int64_t size;
  std::string sha256;  // of the manifest, lower-case
};

/// By the path in the bundle.
using Files = std::map<std::string, File>;

/// The absolute path of the directory `path`, without links.
std::string resolve_directory(const std::string& path);

/// The absolute path of the file `name` of the bundle at `root`; refuses to leave the directory or to follow a link.
std::string confined(const std::string& root, const std::string& name);

/// Throws Error (TARFLOW_ERROR_BUNDLE).
std::string read_file(const std::string& path);

/// A file in memory as long as this lives; pages are read as they are needed. Throws Error (TARFLOW_ERROR_BUNDLE).
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const char* data() const { return static_cast<const char*>(memory_); }
  std::size_t size() const { return size_; }

 private:
  void* memory_;
  std::size_t size_ = 0;
};

std::string sha256_of(const std::string& bytes);

/// Refuses a file whose size or, when `digest`, SHA-256 is not the manifest's.
void check_file(const std::string& root, const std::string& name, const File& file, bool digest);

/// Refuses a file or link in the directory that is neither listed nor the manifest.
void check_unlisted(const std::string& root, const Files& files);

/// An error about the bundle at `root`, which it names.
Error bundle_problem(const std::string& root, const std::string& problem, const std::string& hint = kFetchAgain);

}  // namespace tarflow::detail

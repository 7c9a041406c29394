#include "bundle_files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "sha256.hpp"

namespace tarflow::detail {
namespace {

namespace fs = std::filesystem;

constexpr const char* kUnsafe = "do not use this bundle; fetch it from its source";

std::string digest_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> buffer(1 << 18);
  Sha256 hash;
  while (file) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    hash.update(buffer.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (!file.eof()) throw bundle_error("cannot read " + path, kFetchAgain);
  return hash.finish();
}

}  // namespace

Error bundle_problem(const std::string& root, const std::string& problem, const std::string& hint) {
  return bundle_error("bundle " + root.substr(root.rfind('/') + 1) + ": " + problem, hint);
}

std::string resolve_directory(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(realpath(path.c_str(), nullptr), &std::free);
  struct stat status = {};
  if (!real || stat(real.get(), &status) != 0)
    throw bundle_error("bundle " + path + ": no such directory", "check the path");
  if (!S_ISDIR(status.st_mode))
    throw bundle_error("bundle " + path + ": expected a directory, got a file", "name the NAME.tarflow directory");
  return real.get();
}

std::string confined(const std::string& root, const std::string& name) {
  const auto refuse = [&](const std::string& problem) {
    return bundle_problem(root, "path '" + name + "' " + problem, kUnsafe);
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
    if (lstat(here.c_str(), &status) != 0) throw bundle_problem(root, "file " + name + " is missing");
    if (S_ISLNK(status.st_mode)) throw refuse("passes through a symbolic link");
    start = end + 1;
  }
  if (!S_ISREG(status.st_mode)) throw refuse("is not a regular file");
  return here;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  if (!file) throw bundle_error("cannot read " + path, kFetchAgain);
  return bytes;
}

MappedFile::MappedFile(const std::string& path) : memory_(MAP_FAILED) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status = {};
  if (file >= 0 && fstat(file, &status) == 0) {
    size_ = static_cast<std::size_t>(status.st_size);
    memory_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  if (file >= 0) close(file);
  if (memory_ == MAP_FAILED) throw bundle_error("cannot read " + path, kFetchAgain);
}

MappedFile::~MappedFile() { munmap(memory_, size_); }

std::string sha256_of(const std::string& bytes) {
  Sha256 hash;
  hash.update(bytes.data(), bytes.size());
  return hash.finish();
}

void check_file(const std::string& root, const std::string& name, const File& file, bool digest) {
  struct stat status = {};
  if (stat(file.path.c_str(), &status) != 0) throw bundle_problem(root, "file " + name + " is missing");
  if (status.st_size != file.size)
    throw bundle_problem(root, "file " + name + " has " + std::to_string(status.st_size) +
                                   " bytes, the manifest says " + std::to_string(file.size));
  if (digest && digest_of(file.path) != file.sha256)
    throw bundle_problem(root, "file " + name + " is damaged: its SHA-256 differs from the manifest");
}

void check_unlisted(const std::string& root, const Files& files) {
  std::error_code error;
  for (fs::recursive_directory_iterator entry(root, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().string().substr(root.size() + 1);
    if (fs::is_directory(entry->symlink_status(error)) || name == "manifest.json" || files.count(name) != 0) continue;
    throw bundle_problem(root, "holds " + name + ", which the manifest does not list",
                         "remove it, or fetch the bundle again");
  }
  if (error) throw bundle_problem(root, "cannot be listed: " + error.message(), "make its directories readable");
}

}  // namespace tarflow::detail

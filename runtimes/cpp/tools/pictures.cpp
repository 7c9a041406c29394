#include "pictures.hpp"

#include <png.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "arguments.hpp"

namespace tool {
namespace {

constexpr std::int64_t kPadding = 2;  // white pixels between the images of a grid

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() > ending.size() && text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

std::string parent_of(const std::string& path) {
  const std::size_t end = path.find_last_not_of('/');
  const std::size_t slash = path.rfind('/', end);
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

/// A scratch folder beside the output, removed with what is left in it.
class Scratch {
 public:
  explicit Scratch(const std::string& parent) : path_(parent + "/.tarflow-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr)
      throw refused(parent + ": cannot write there (" + std::strerror(errno) + ")",
                    "give a folder that you may write to");
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const std::string& file : files_) std::remove(file.c_str());
    rmdir(path_.c_str());
  }
  std::string file(const std::string& name) { return files_.emplace_back(path_ + "/" + name); }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

void move_into_place(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0)
    throw tarflow::Error(TARFLOW_ERROR_INTERNAL, to + ": " + std::strerror(errno), "check the path");
}

/// A picture [height, width, C] of 8-bit values; C is 1 or 3.
struct Sheet {
  std::int64_t height, width, channels;
  std::vector<png_byte> values;
};

/// libpng reports by a jump: nothing with a destructor may be made between the two.
bool encode(std::FILE* file, const Sheet& sheet, png_bytepp rows, png_textp chunks, int count) {
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  if (info == nullptr || setjmp(png_jmpbuf(png)) != 0) {
    png_destroy_write_struct(&png, &info);
    return false;
  }
  png_init_io(png, file);
  png_set_IHDR(png, info, static_cast<png_uint_32>(sheet.width), static_cast<png_uint_32>(sheet.height), 8,
               sheet.channels == 1 ? PNG_COLOR_TYPE_GRAY : PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_set_text(png, info, chunks, count);
  png_write_info(png, info);
  png_write_image(png, rows);
  png_write_end(png, nullptr);
  png_destroy_write_struct(&png, &info);
  return true;
}

void save_png(const std::string& path, Sheet& sheet, const Text& text) {
  std::vector<png_bytep> rows;
  for (std::int64_t y = 0; y < sheet.height; ++y)
    rows.push_back(sheet.values.data() + y * sheet.width * sheet.channels);
  std::vector<png_text> chunks;
  std::vector<std::string> kept;
  kept.reserve(2 * text.size());
  for (const auto& [key, value] : text) {
    png_text chunk = {};
    chunk.compression = PNG_ITXT_COMPRESSION_NONE;
    chunk.key = kept.emplace_back(key).data();
    chunk.text = kept.emplace_back(value).data();
    chunks.push_back(chunk);
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "wb"), std::fclose);
  if (!file || !encode(file.get(), sheet, rows.data(), chunks.data(), static_cast<int>(chunks.size())) ||
      std::fflush(file.get()) != 0)
    throw tarflow::Error(TARFLOW_ERROR_INTERNAL, path + ": cannot write: " + std::strerror(errno), "check the disk");
}

/// 8-bit values of image `image` into the sheet, its corner at (top, left).
void draw(Sheet& sheet, const float* pixels, std::int64_t side, std::int64_t top, std::int64_t left) {
  for (std::int64_t channel = 0; channel < sheet.channels; ++channel)
    for (std::int64_t y = 0; y < side; ++y)
      for (std::int64_t x = 0; x < side; ++x) {
        const double value = std::clamp(static_cast<double>(*pixels++), -1.0, 1.0);
        sheet.values[static_cast<std::size_t>(((top + y) * sheet.width + left + x) * sheet.channels + channel)] =
            static_cast<png_byte>(std::nearbyint(127.5 * value + 127.5));
      }
}

Sheet blank(std::int64_t height, std::int64_t width, std::int64_t channels) {
  return {height, width, channels, std::vector<png_byte>(static_cast<std::size_t>(height * width * channels), 255)};
}

void save_array(const std::string& path, const std::vector<float>& images, std::int64_t n, const tarflow_config& c) {
  std::string shape = std::to_string(n);
  const bool is_tokens = c.data == TARFLOW_DATA_TOKENS;
  for (const std::int64_t axis : is_tokens ? std::vector<std::int64_t>{c.patches, c.patch_values}
                                           : std::vector<std::int64_t>{c.image_channels, c.image_size, c.image_size})
    shape += ", " + std::to_string(axis);
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  header += '\n';
  const char start[] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<char>(header.size() & 255),
                        static_cast<char>(header.size() >> 8)};
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "wb"), std::fclose);
  if (!file || std::fwrite(start, 1, sizeof start, file.get()) != sizeof start ||
      std::fwrite(header.data(), 1, header.size(), file.get()) != header.size() ||
      std::fwrite(images.data(), sizeof(float), images.size(), file.get()) != images.size() ||
      std::fflush(file.get()) != 0)
    throw tarflow::Error(TARFLOW_ERROR_INTERNAL, path + ": cannot write: " + std::strerror(errno), "check the disk");
}

void check_finite(const std::vector<float>& images, std::size_t n) {
  const std::size_t dims = images.size() / n;
  std::size_t broken = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float* image = images.data() + i * dims;
    broken += std::all_of(image, image + dims, [](float value) { return std::isfinite(value); }) ? 0 : 1;
  }
  if (broken != 0)
    throw refused(std::to_string(broken) + " of " + std::to_string(n) + " images hold values that are not finite",
                  "lower the guidance, or check the model");
}

}  // namespace

Output check_output(const std::string& path, bool overwrite) {
  struct stat status = {};
  const bool exists = stat(path.c_str(), &status) == 0;
  const bool is_folder = (exists && S_ISDIR(status.st_mode)) || (!path.empty() && path.back() == '/');
  if (!is_folder && !ends_with(path, ".png") && !ends_with(path, ".npy"))
    throw refused("-o " + path + ": cannot tell what to write", "the name must end in .png, / (a folder), .npy");
  const std::string parent = parent_of(path);
  struct stat folder = {};
  if (stat(parent.c_str(), &folder) != 0 || !S_ISDIR(folder.st_mode))
    throw refused("-o " + path + ": the folder " + parent + " does not exist", "mkdir -p " + parent);
  if (exists && is_folder && !S_ISDIR(status.st_mode))
    throw refused("-o " + path + ": is not a folder", "give another name");
  if (exists && !is_folder && !overwrite)
    throw refused("-o " + path + ": exists already", "add --overwrite, or give another name");
  if (access(is_folder && exists ? path.c_str() : parent.c_str(), W_OK) != 0)
    throw refused("-o " + path + ": cannot write there (" + std::strerror(errno) + ")",
                  "give a folder that you may write to");
  return {path, is_folder ? Kind::folder : ends_with(path, ".png") ? Kind::grid : Kind::array, overwrite};
}

void check_pictures(const Output& output, const tarflow_config& config, const std::vector<std::string>& names) {
  if (output.kind == Kind::array) return;
  if (config.data == TARFLOW_DATA_TOKENS)
    throw refused("-o " + output.path + ": the model draws tokens, which are no pictures",
                  "write them as an array: -o tokens.npy");
  const std::int64_t channels = config.image_channels;
  if (channels != 1 && channels != 3)
    throw refused("-o " + output.path + ": PNG files have 1 or 3 channels, the model has " + std::to_string(channels),
                  "write the images as an array: -o images.npy");
  for (const std::string& name : names) {
    if (output.kind == Kind::folder && !output.overwrite && access((output.path + "/" + name).c_str(), F_OK) == 0)
      throw refused("-o " + output.path + ": holds " + name + " already", "add --overwrite, or give another folder");
  }
}

std::vector<std::string> write_pictures(const Output& output, const std::vector<float>& images,
                                        const tarflow_config& config, const std::vector<std::string>& names,
                                        std::int64_t columns, const Text& text) {
  const auto n = static_cast<std::int64_t>(names.size());
  const std::int64_t side = config.image_size, dims = config.patches * config.patch_values;
  if (output.kind == Kind::array) {
    Scratch scratch(parent_of(output.path));
    const std::string file = scratch.file("images.npy");
    save_array(file, images, n, config);
    move_into_place(file, output.path);
    return {output.path};
  }
  check_finite(images, names.size());
  if (output.kind == Kind::grid) {
    if (columns == 0) columns = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(n))));
    const std::int64_t space = side + kPadding, rows = (n - 1) / columns + 1;
    Sheet sheet = blank(rows * space - kPadding, columns * space - kPadding, config.image_channels);
    for (std::int64_t i = 0; i < n; ++i)
      draw(sheet, images.data() + i * dims, side, i / columns * space, i % columns * space);
    Scratch scratch(parent_of(output.path));
    const std::string file = scratch.file("grid.png");
    save_png(file, sheet, text);
    move_into_place(file, output.path);
    return {output.path};
  }
  const bool made = mkdir(output.path.c_str(), 0777) == 0;
  std::vector<std::string> files, written;
  try {
    Scratch scratch(output.path);
    for (std::int64_t i = 0; i < n; ++i) {
      Sheet sheet = blank(side, side, config.image_channels);
      draw(sheet, images.data() + i * dims, side, 0, 0);
      files.push_back(scratch.file(names[static_cast<std::size_t>(i)]));
      save_png(files.back(), sheet, text);
    }
    const std::string folder = output.path + (output.path.back() == '/' ? "" : "/");
    for (std::size_t i = 0; i < files.size(); ++i) {
      move_into_place(files[i], folder + names[i]);
      written.push_back(folder + names[i]);
    }
  } catch (...) {
    if (made) rmdir(output.path.c_str());
    throw;
  }
  return written;
}

}  // namespace tool

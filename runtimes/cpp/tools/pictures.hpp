// Where images go: a grid, a folder of PNG files, or an array; checked before any work, written whole or not at all.
#pragma once

#include <string>
#include <tarflow/tarflow.hpp>
#include <utility>
#include <vector>

namespace tool {

/// Text chunks of a PNG file.
using Text = std::vector<std::pair<std::string, std::string>>;

enum class Kind { grid, folder, array };

/// A place to write to, known to be writable and free.
struct Output {
  std::string path;
  Kind kind;
  bool overwrite;
};

/// Read `-o` and make sure that it can be written; creates nothing. Throws tarflow::Error.
Output check_output(const std::string& path, bool overwrite);

/// Make sure that images of this model can be PNG files, and that a folder holds none of these names yet.
void check_pictures(const Output& output, const tarflow_config& config, const std::vector<std::string>& names);

/// Write images [n, C, side, side], or tokens [n, N, D], n the number of `names`; returns the files written. A grid has
/// `columns` (0 is near-square), white lines of two pixels between the images, and values
/// rint(127.5 * clip(x, -1, 1) + 127.5).
std::vector<std::string> write_pictures(const Output& output, const std::vector<float>& images,
                                        const tarflow_config& config, const std::vector<std::string>& names,
                                        std::int64_t columns, const Text& text);

}  // namespace tool

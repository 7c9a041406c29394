#include "arguments.hpp"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>

namespace tool {

const char* const kUsage =
    "usage: tarflow-sample BUNDLE [options]\n"
    "\n"
    "Draw images from a bundle. They are the same for the same seed, on every machine and in any batch size, up to\n"
    "rounding, and those that tarflow-infer draws.\n"
    "\n"
    "  --engine ENGINE              native, ort-cpu, or auto: native where it reads the bundle's precision [default:\n"
    "                               auto]\n"
    "  --ort-library FILE           ONNX Runtime's library [default: searched]\n"
    "  --threads COUNT              processors to use [default: all that this process may use]\n"
    "  -n COUNT                     images to draw [default: one per label, else 16]\n"
    "  --labels LIST                classes by number or name, as 0,1,2 or cat,dog; null for no class; all;\n"
    "                               repeated up to -n\n"
    "  --first-index INDEX          number of the first image: a job cut into ranges draws the same noise\n"
    "  --batch-size COUNT           images that run together [default: 64]\n"
    "  --guidance WEIGHT            guidance weight, 0 for none\n"
    "  --guide a|b|ab               guide the scales a, the shifts b, or both\n"
    "  --attention-temperature TAU  of the branch that guidance moves away from\n"
    "  --anneal-guidance            let guidance grow from patch to patch up to its weight\n"
    "  --seed SEED                  seed of the noise [default: drawn, and reported]\n"
    "  --no-denoise                 leave the training noise in the images\n"
    "  -o, --output PATH            grid.png, folder/ (a PNG per image) or images.npy [default: samples.png]\n"
    "  --overwrite                  replace files that exist\n"
    "  --json                       report on stdout as one JSON object\n"
    "  --version, --help\n"
    "\n"
    "Exit status: 0 done, 1 the work failed, 2 bad input, 130 interrupted.\n";

namespace {

std::uint64_t whole(const std::string& flag, const std::string& text, std::uint64_t minimum, std::uint64_t maximum) {
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), nullptr, 10);
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos || errno != 0 || value < minimum ||
      value > maximum)
    throw refused(flag + " must be an integer from " + std::to_string(minimum) + " to " + std::to_string(maximum) +
                  ", got '" + text + "'");
  return value;
}

std::int64_t count(const std::string& flag, const std::string& text) {
  return static_cast<std::int64_t>(whole(flag, text, 1, INT32_MAX));
}

double real(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw refused(flag + " must be a number, got '" + text + "'");
  return value;
}

int guide(const std::string& text) {
  if (text != "a" && text != "b" && text != "ab")
    throw refused("--guide must be one of a, b, ab, got '" + text + "'", "ab guides scales and shifts");
  return text == "a" ? TARFLOW_GUIDE_A : text == "b" ? TARFLOW_GUIDE_B : TARFLOW_GUIDE_AB;
}

void check_guidance(const tarflow::SampleOptions& options) {
  if (!(options.guidance >= 0.0 && std::isfinite(options.guidance)))
    throw refused("--guidance must be a finite number and not negative, got " + repr(options.guidance),
                  "0 is no guidance, 1 to 3 is usual");
  if (!(options.attention_temperature > 0.0 && std::isfinite(options.attention_temperature)))
    throw refused("--attention-temperature must be a positive number, got " + repr(options.attention_temperature),
                  "1 leaves the attention as it is");
}

std::string trimmed(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

bool is_number(const std::string& text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
}

std::string valid(std::int64_t classes, const std::vector<std::string>& names) {
  const std::string range = "0 to " + std::to_string(classes - 1);
  constexpr std::size_t kShown = 20;
  std::string listed;
  bool numbers = false, plain = true;  // plain: every name is its own number
  for (std::size_t k = 0; k < names.size(); ++k) {
    plain = plain && names[k] == std::to_string(k);
    if (k < kShown) listed += (k == 0 ? "" : ", ") + names[k];
    numbers = numbers || is_number(names[k]);
  }
  if (plain) return range;
  if (names.size() > kShown) listed += " ... (" + std::to_string(classes) + " in all)";
  return numbers ? listed : listed + "; or " + range;
}

}  // namespace

tarflow::Error refused(const std::string& message, const std::string& hint) {
  return {TARFLOW_ERROR_INPUT, message, hint};
}

std::string repr(double value) {
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  const std::string shortest = text;
  return shortest.find_first_not_of("-0123456789") == std::string::npos ? shortest + ".0" : shortest;
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag.empty() || flag[0] != '-') {
      if (!a.bundle.empty()) throw refused("one BUNDLE only, got '" + flag + "' as well");
      a.bundle = flag;
      continue;
    }
    std::string attached;
    const std::size_t equals = flag.compare(0, 2, "--") == 0 ? flag.find('=') : std::string::npos;
    const bool has_attached = equals != std::string::npos;
    if (has_attached) {
      attached = flag.substr(equals + 1);
      flag.erase(equals);
    }
    const auto value = [&]() -> std::string {
      if (has_attached) return attached;
      if (i + 1 >= argc) throw refused("option '" + flag + "' requires an argument");
      return argv[++i];
    };
    const auto is_switch = [&](const char* name) { return flag == name && !has_attached; };
    if (flag == "-n") a.n = count(flag, value());
    else if (flag == "--engine") a.model.engine = value();
    else if (flag == "--ort-library") a.model.ort_library = value();
    else if (flag == "--threads") a.model.threads = static_cast<int>(whole(flag, value(), 1, 4096));
    else if (flag == "--labels") a.labels = value();
    else if (flag == "--first-index") a.options.first_index = whole(flag, value(), 0, UINT64_MAX);
    else if (flag == "--batch-size") a.options.batch_size = count(flag, value());
    else if (flag == "--guidance") a.options.guidance = real(flag, value());
    else if (flag == "--guide") a.options.guide = guide(value());
    else if (flag == "--attention-temperature") a.options.attention_temperature = real(flag, value());
    else if (is_switch("--anneal-guidance")) a.options.anneal_guidance = true;
    else if (flag == "--seed") a.seed = whole(flag, value(), 0, UINT64_MAX);
    else if (is_switch("--no-denoise")) a.options.denoise = false;
    else if (flag == "-o" || flag == "--output") a.output = value();
    else if (is_switch("--overwrite")) a.overwrite = true;
    else if (is_switch("--json")) a.json = true;
    else throw refused("no such option: " + flag);
  }
  if (a.bundle.empty()) throw refused("missing argument 'BUNDLE'");
  check_guidance(a.options);
  return a;
}

std::vector<std::string> names_of(const tarflow::Model& model) {
  std::vector<std::string> names;
  for (std::int64_t k = 0; k < model.config().classes; ++k) {
    const char* name = nullptr;
    if (tarflow_model_label(model.get(), k, &name) != TARFLOW_OK) return {};
    names.emplace_back(name);
  }
  return names;
}

std::vector<std::int64_t> parse_labels(const std::string& text, const tarflow::Model& model,
                                       const std::vector<std::string>& names) {
  const std::int64_t classes = model.config().classes;
  if (classes == 0) throw refused("--labels was given, but the model has no classes", "leave --labels out");
  std::vector<std::int64_t> found;
  if (trimmed(text) == "all") {
    for (std::int64_t k = 0; k < classes; ++k) found.push_back(k);
    return found;
  }
  const bool numbers = !std::any_of(names.begin(), names.end(), is_number);
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(',', start), text.size());
    const std::string item = trimmed(text.substr(start, end - start));
    start = end + 1;
    const auto named = std::find(names.begin(), names.end(), item);
    std::int64_t number = classes;
    if (item == "null" || item == "-1") number = -1;
    else if (named != names.end()) number = named - names.begin();
    else if (numbers && is_number(item) && item.size() < 10 && std::to_string(std::stoll(item)) == item)
      number = std::stoll(item);
    if (number >= classes)
      throw refused("--labels: the model has no class '" + item + "'",
                    "valid are " + valid(classes, names) + ", null, all");
    found.push_back(number);
  }
  return found;
}

}  // namespace tool

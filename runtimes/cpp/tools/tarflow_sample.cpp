// tarflow-sample: draw images from a bundle, with the core flags of `tarflow-infer`.
#include <png.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <tarflow/tarflow.hpp>
#include <vector>

namespace {

constexpr const char* kUsage =
    "usage: tarflow-sample BUNDLE [options]\n"
    "  -n COUNT                     images to draw [default: one per label, else 16]\n"
    "  --labels LIST                classes by number or name, as 0,1,2; null for no class; all; repeated up to -n\n"
    "  --first-index INDEX          number of the first image [default: 0]\n"
    "  --batch-size COUNT           images that run together [default: 64]\n"
    "  --guidance WEIGHT            guidance weight, 0 for none [default: 0]\n"
    "  --guide a|b|ab               guide the scales a, the shifts b, or both [default: ab]\n"
    "  --attention-temperature TAU  of the branch that guidance moves away from [default: 1]\n"
    "  --anneal-guidance            let guidance grow from patch to patch\n"
    "  --seed SEED                  seed of the noise [default: drawn, and reported]\n"
    "  --no-denoise                 leave the training noise in the images\n"
    "  --threads COUNT              inside the operators [default: one per processor]\n"
    "  --ort-library PATH           ONNX Runtime's library [default: searched]\n"
    "  -o, --output PATH            a grid of the images, PNG [default: samples.png]\n"
    "  --overwrite                  replace a file that exists\n"
    "  --version, --help\n";

struct Arguments {
  std::string bundle, labels, output = "samples.png";
  std::int64_t n = 0;
  bool seeded = false, overwrite = false;
  tarflow::SampleOptions options;
  tarflow::Model::Options model;
};

tarflow::Error usage(const std::string& message, const std::string& hint = "see tarflow-sample --help") {
  return {TARFLOW_ERROR_INPUT, message, hint};
}

std::uint64_t whole(const std::string& flag, const std::string& text, std::uint64_t minimum, std::uint64_t maximum) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos || errno != 0 || value < minimum ||
      value > maximum)
    throw usage(flag + " must be an integer from " + std::to_string(minimum) + " to " + std::to_string(maximum) +
                ", got '" + text + "'");
  return value;
}

double real(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw usage(flag + " must be a number, got '" + text + "'");
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag.empty() || flag[0] != '-') {
      if (!a.bundle.empty()) throw usage("one BUNDLE only, got '" + flag + "' as well");
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
      if (i + 1 >= argc) throw usage(flag + " needs a value");
      return argv[++i];
    };
    if (flag == "-n") a.n = static_cast<std::int64_t>(whole(flag, value(), 1, INT32_MAX));
    else if (flag == "--labels") a.labels = value();
    else if (flag == "--first-index") a.options.first_index = whole(flag, value(), 0, UINT64_MAX);
    else if (flag == "--batch-size") a.options.batch_size = static_cast<std::int64_t>(whole(flag, value(), 1, INT32_MAX));
    else if (flag == "--guidance") a.options.guidance = real(flag, value());
    else if (flag == "--guide") {
      const std::string guide = value();
      if (guide != "a" && guide != "b" && guide != "ab") throw usage("--guide must be a, b or ab, got '" + guide + "'");
      a.options.guide = guide == "a" ? TARFLOW_GUIDE_A : guide == "b" ? TARFLOW_GUIDE_B : TARFLOW_GUIDE_AB;
    } else if (flag == "--attention-temperature") a.options.attention_temperature = real(flag, value());
    else if (flag == "--anneal-guidance" && !has_attached) a.options.anneal_guidance = true;
    else if (flag == "--seed") {
      a.options.seed = whole(flag, value(), 0, UINT64_MAX);
      a.seeded = true;
    } else if (flag == "--no-denoise" && !has_attached) a.options.denoise = false;
    else if (flag == "--threads") a.model.threads = static_cast<int>(whole(flag, value(), 1, 4096));
    else if (flag == "--ort-library") a.model.ort_library = value();
    else if (flag == "-o" || flag == "--output") a.output = value();
    else if (flag == "--overwrite" && !has_attached) a.overwrite = true;
    else throw usage("unknown option " + flag);
  }
  if (a.bundle.empty()) throw usage("BUNDLE is missing");
  if (a.output.size() < 5 || a.output.substr(a.output.size() - 4) != ".png")
    throw usage("--output must end in .png, got '" + a.output + "'");
  if (!a.overwrite && access(a.output.c_str(), F_OK) == 0)
    throw usage(a.output + " exists", "give another name, or --overwrite");
  if (!a.seeded) a.options.seed = std::random_device{}();
  return a;
}

std::int64_t class_of(const std::string& text, const tarflow::Model& model) {
  const tarflow_config& config = model.config();
  if (text == "null") return -1;
  for (std::int64_t k = 0; k < config.classes; ++k) {
    const char* name = nullptr;
    if (tarflow_model_label(model.get(), k, &name) == TARFLOW_OK && text == name) return k;
  }
  if (config.classes == 0) throw usage("labels were given, but the model has no classes", "leave --labels out");
  return static_cast<std::int64_t>(whole("a label", text, 0, static_cast<std::uint64_t>(config.classes - 1)));
}

/// The classes of --labels, once each.
std::vector<std::int64_t> listed(const std::string& text, const tarflow::Model& model) {
  std::vector<std::int64_t> classes;
  if (text == "all" && model.config().classes != 0) {
    for (std::int64_t k = 0; k < model.config().classes; ++k) classes.push_back(k);
    return classes;
  }
  for (std::size_t start = 0; !text.empty() && start <= text.size();) {
    const std::size_t end = std::min(text.find(',', start), text.size());
    classes.push_back(class_of(text.substr(start, end - start), model));
    start = end + 1;
  }
  return classes;
}

/// Images row by row on a white sheet, near-square, two pixels apart: the grid of tarflow-infer.
void write_grid(const std::vector<float>& images, std::int64_t n, const tarflow_config& config, const std::string& path) {
  const std::int64_t side = config.image_size, channels = config.image_channels, space = side + 2;
  if (channels != 1 && channels != 3)
    throw usage("a PNG has 1 or 3 channels, the images have " + std::to_string(channels));
  const auto columns = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(n))));
  const std::int64_t width = columns * space - 2, height = ((n - 1) / columns + 1) * space - 2;
  std::vector<png_byte> sheet(static_cast<std::size_t>(width * height * channels), 255);
  std::size_t next = 0;
  for (std::int64_t image = 0; image < n; ++image)
    for (std::int64_t channel = 0; channel < channels; ++channel)
      for (std::int64_t y = 0; y < side; ++y)
        for (std::int64_t x = 0; x < side; ++x) {
          const double value = static_cast<double>(images[next++]);
          if (!std::isfinite(value))
            throw tarflow::Error(TARFLOW_ERROR_ENGINE, "image " + std::to_string(image) + " holds values that are not finite",
                                 "lower the guidance, or check the model");
          const std::int64_t row = (image / columns) * space + y, column = (image % columns) * space + x;
          sheet[static_cast<std::size_t>((row * width + column) * channels + channel)] =
              static_cast<png_byte>(std::nearbyint(127.5 * std::clamp(value, -1.0, 1.0) + 127.5));
        }
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  png.width = static_cast<png_uint_32>(width);
  png.height = static_cast<png_uint_32>(height);
  png.format = channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
  const std::string part = path + ".part";  // appears whole or not at all
  const bool written = png_image_write_to_file(&png, part.c_str(), 0, sheet.data(), 0, nullptr) != 0;
  if (!written || std::rename(part.c_str(), path.c_str()) != 0) {
    const std::string reason = written ? std::strerror(errno) : png.message;
    std::remove(part.c_str());
    throw tarflow::Error(TARFLOW_ERROR_INTERNAL, "cannot write " + path + ": " + reason, "check the path");
  }
}

volatile std::sig_atomic_t interrupted = 0;

void interrupt(int) { interrupted = 1; }

int run(int argc, char** argv) {
  Arguments arguments = parse(argc, argv);
  const tarflow::Model model(arguments.bundle, arguments.model);
  std::vector<std::int64_t> classes = listed(arguments.labels, model);
  const std::int64_t n =
      arguments.n != 0 ? arguments.n : classes.empty() ? 16 : static_cast<std::int64_t>(classes.size());
  std::vector<std::int64_t> labels;
  for (std::int64_t i = 0; i < n && !classes.empty(); ++i) labels.push_back(classes[static_cast<std::size_t>(i) % classes.size()]);
  std::signal(SIGINT, interrupt);
  arguments.options.on_step = [](const tarflow_step&) { return interrupted == 0; };
  const std::vector<float> images = tarflow::Sampler(model).sample(n, labels, arguments.options);
  write_grid(images, n, model.config(), arguments.output);
  std::fprintf(stderr, "%s: %lld images, seed %llu, ONNX Runtime %s\n", arguments.output.c_str(),
               static_cast<long long>(n), static_cast<unsigned long long>(arguments.options.seed), tarflow_ort_version());
  return 0;
}

}  // namespace

/// Exit status: 0 done, 1 the work failed, 2 bad input or no ONNX Runtime, 130 interrupted.
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) return std::fputs(kUsage, stdout) < 0 ? 1 : 0;
    if (std::strcmp(argv[i], "--version") == 0) return std::printf("tarflow-sample %s\n", tarflow_version()) < 0 ? 1 : 0;
  }
  try {
    return run(argc, argv);
  } catch (const tarflow::Error& error) {
    if (error.code() == TARFLOW_ERROR_CANCELLED) return 130;
    std::fprintf(stderr, "error: %s\n", error.what());
    if (!error.hint().empty()) std::fprintf(stderr, "hint: %s\n", error.hint().c_str());
    const bool input = error.code() == TARFLOW_ERROR_INPUT || error.code() == TARFLOW_ERROR_BUNDLE ||
                       (error.code() == TARFLOW_ERROR_ENGINE && *tarflow_ort_version() == '\0');
    return input ? 2 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

// Runs one job of the native kernel from a file, where Python and ctypes do not reach: under sanitizers and emulators.
//
//     runner JOB KERNEL THREADS OUTPUT
//
// KERNEL - is the best one. OUTPUT is x, the inverse of the noise, then z and log|det| of x. With more than one thread
// the same job runs in two calls at once that share the packed weights, another thread watches the progress, and two
// more calls are cancelled; that is what the thread sanitizer looks at. The format of JOB is `write_job` of
// conftest.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "tarflow_native.h"

namespace {

struct Reader {
  std::vector<char> bytes;
  std::size_t at = 0;

  const char *take(std::size_t count) {
    if (bytes.size() - at < count) std::exit(3);
    at += count;
    return bytes.data() + at - count;
  }
  std::int64_t integer() {
    std::int64_t value;
    std::memcpy(&value, take(8), 8);
    return value;
  }
  std::string text() {
    const std::int64_t size = integer();
    return std::string(take(static_cast<std::size_t>(size)), static_cast<std::size_t>(size));
  }
  template <class T>
  std::vector<T> array() {
    const std::int64_t size = integer();
    std::vector<T> values(static_cast<std::size_t>(size) / sizeof(T));
    if (size) std::memcpy(values.data(), take(static_cast<std::size_t>(size)), static_cast<std::size_t>(size));
    return values;
  }
};

struct Aligned {
  explicit Aligned(std::size_t size) : bytes(size), pointer(std::aligned_alloc(64, (size + 63) / 64 * 64)) {}
  ~Aligned() { std::free(pointer); }
  std::size_t bytes;
  void *pointer;
};

/// The inverse of the noise, and what the forward pass makes of that.
struct Made {
  Made(std::size_t values, std::size_t images) : x(values), z(values), log_det(images) {}

  std::string bytes() const {
    std::string all(2 * x.size() * sizeof(float) + log_det.size() * sizeof(double), '\0');
    std::memcpy(all.data(), x.data(), x.size() * sizeof(float));
    std::memcpy(all.data() + x.size() * sizeof(float), z.data(), z.size() * sizeof(float));
    std::memcpy(all.data() + 2 * x.size() * sizeof(float), log_det.data(), log_det.size() * sizeof(double));
    return all;
  }
  std::vector<float> x, z;
  std::vector<double> log_det;
};

void require(std::int32_t status, const char *what) {
  if (status == TARFLOW_NATIVE_OK) return;
  std::fprintf(stderr, "%s: %s\n", what, tarflow_native_message(status));
  std::exit(1);
}

} // namespace

int main(int count, char **arguments) {
  if (count != 5) return 2;
  std::ifstream file(arguments[1], std::ios::binary);
  Reader job{std::vector<char>(std::istreambuf_iterator<char>(file), {})};
  tarflow_native_shape shape{};
  for (std::int64_t *field : {&shape.patches, &shape.values, &shape.width, &shape.layers, &shape.head_dim,
                              &shape.classes, &shape.nvp})
    *field = job.integer();
  const std::int64_t batch = job.integer(), branches = job.integer(), steps = job.integer(), tensors = job.integer();
  const std::string precision = job.text();
  std::vector<std::string> names, dtypes;
  std::vector<std::vector<std::int64_t>> shapes;
  std::vector<std::int64_t> offsets;
  for (std::int64_t i = 0; i < tensors; ++i) {
    names.push_back(job.text());
    dtypes.push_back(job.text());
    shapes.push_back(job.array<std::int64_t>());
    offsets.push_back(job.integer());
  }
  std::vector<tarflow_native_tensor> table;
  for (std::size_t i = 0; i < names.size(); ++i)
    table.push_back({names[i].c_str(), dtypes[i].c_str(), shapes[i].data(), static_cast<std::int64_t>(shapes[i].size()),
                     offsets[i]});
  const auto weights = job.array<char>();
  const auto noise = job.array<float>();
  const auto labels = job.array<std::int64_t>();
  const auto guidance = job.array<float>();
  const auto inverse_temperature = job.array<float>();

  Aligned packed(tarflow_native_packed_bytes(&shape, precision.c_str()));
  require(tarflow_native_pack(&shape, precision.c_str(), table.data(), tensors, weights.data(), weights.size(),
                              packed.pointer, packed.bytes, nullptr),
          "pack");
  const std::int64_t threads = std::atoll(arguments[3]);
  const char *kernel = std::strcmp(arguments[2], "-") == 0 ? nullptr : arguments[2];
  const auto invert = [&](std::vector<float> &x, const std::int32_t *cancel, std::int64_t *progress) {
    Aligned room(tarflow_native_workspace_bytes(&shape, batch, branches, threads));
    tarflow_native_run run{};
    run.struct_size = sizeof run;
    run.packed = packed.pointer;
    run.packed_bytes = packed.bytes;
    run.batch = batch;
    run.branches = branches;
    run.steps = steps;
    run.threads = threads;
    run.kernel = kernel;
    run.noise = noise.data();
    run.x = x.data();
    run.labels = labels.empty() ? nullptr : labels.data();
    run.guidance = guidance.data();
    run.inverse_temperature = inverse_temperature.data();
    run.workspace = room.pointer;
    run.workspace_bytes = room.bytes;
    run.cancel = cancel;
    run.progress = progress;
    return tarflow_native_invert(&run);
  };

  const auto forward = [&](Made &made, const std::int32_t *cancel, std::int64_t *progress) {
    Aligned room(tarflow_native_forward_bytes(&shape, batch, threads));
    tarflow_native_pass pass{};
    pass.struct_size = sizeof pass;
    pass.packed = packed.pointer;
    pass.packed_bytes = packed.bytes;
    pass.batch = batch;
    pass.threads = threads;
    pass.kernel = kernel;
    pass.x = made.x.data();
    pass.z = made.z.data();
    pass.log_det = made.log_det.data();
    pass.labels = labels.empty() ? nullptr : labels.data();
    pass.workspace = room.pointer;
    pass.workspace_bytes = room.bytes;
    pass.cancel = cancel;
    pass.progress = progress;
    return tarflow_native_forward(&pass);
  };
  const auto both = [&](Made &made, const std::int32_t *cancel, std::int64_t *progress) {
    const std::int32_t status = invert(made.x, cancel, progress);
    return status == TARFLOW_NATIVE_OK ? forward(made, cancel, progress) : status;
  };

  const auto images = static_cast<std::size_t>(batch);
  Made made(noise.size(), images);
  std::int64_t progress = 0;
  if (threads == 1) {
    require(both(made, nullptr, &progress), "first");
  } else {
    Made other(noise.size(), images), third(noise.size(), images), fourth(noise.size(), images);
    std::int32_t cancel[] = {0, 0}; // within the inverse, and within the forward pass
    std::atomic<bool> ended{false};
    const auto run_to_its_end = [&](Made &own, const std::int32_t *flag, const char *what) {
      const std::int32_t status = both(own, flag, nullptr);
      if (status != TARFLOW_NATIVE_CANCELLED) require(status, what);
    };
    std::thread calls[] = {std::thread([&] { require(both(other, nullptr, nullptr), "second"); }),
                           std::thread([&] { run_to_its_end(third, &cancel[0], "third"); }),
                           std::thread([&] { run_to_its_end(fourth, &cancel[1], "fourth"); })};
    std::thread watcher([&] {
      while (!ended)
        for (const int i : {0, 1})
          if (__atomic_load_n(&progress, __ATOMIC_RELAXED) > i * batch * steps)
            __atomic_store_n(&cancel[i], 1, __ATOMIC_RELAXED);
    });
    require(both(made, nullptr, &progress), "first");
    ended = true;
    watcher.join();
    for (const int i : {0, 1}) __atomic_store_n(&cancel[i], 1, __ATOMIC_RELAXED);
    for (std::thread &call : calls) call.join();
    if (made.bytes() != other.bytes()) return 4;
  }
  if (progress != 2 * batch * steps) return 5;
  const std::string bytes = made.bytes();
  std::ofstream(arguments[4], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
}

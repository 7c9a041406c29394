// Memory: memory BUNDLE ENGINE SAMPLES
//
// This program replaces operator new and calloc, which libtarflow and ONNX Runtime then call, and tells them apart by
// the module of the caller. It shows that libtarflow allocates nothing from step to step, that the heap does not grow
// over SAMPLES samples, and that any one of its allocations may fail: the call says so, nothing leaks, and the next
// call works.
#include <execinfo.h>
#include <link.h>
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

struct Module {
  std::uintptr_t begin = 0, end = 0;
  bool holds(const void* address) const {
    const auto here = reinterpret_cast<std::uintptr_t>(address);
    return begin <= here && here < end;
  }
};

Module tarflow_module, ort_module;
std::atomic<bool> counting{false};  // once the modules are known
std::atomic<long> own{0};            // allocations of libtarflow
std::atomic<long> alive{0};          // those that are not released
std::atomic<long> fails_at{0};     // the one that fails; 0 for none
std::atomic<bool> strangely{false};  // fails with an exception that operator new may not throw

Module module_of(const char* name) {
  struct Search {
    const char* name;
    Module found;
  } search{name, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* wanted = static_cast<Search*>(data);
        if (std::strstr(info->dlpi_name, wanted->name) == nullptr) return 0;
        wanted->found.begin = info->dlpi_addr;
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_LOAD)
            wanted->found.end = std::max<std::uintptr_t>(
                wanted->found.end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
        return 1;
      },
      &search);
  return search.found;
}

/// Whether libtarflow asked: the first of the two modules up the stack. Between them lie strings of libstdc++.
bool is_own(const void* caller) {
  if (tarflow_module.holds(caller)) return true;
  if (ort_module.holds(caller)) return false;
  void* frames[16];
  const int depth = backtrace(frames, 16);
  for (int i = 0; i < depth; ++i) {
    if (tarflow_module.holds(frames[i])) return true;
    if (ort_module.holds(frames[i])) return false;
  }
  return false;
}

/// Before each block lies whether it is libtarflow's.
constexpr std::size_t kHeader = alignof(std::max_align_t);

void* allocate(std::size_t size, std::size_t alignment, const void* caller) {
  const bool ours = counting && is_own(caller);
  if (ours && ++own == fails_at) {
    if (strangely) throw std::runtime_error("a strange failure");
    throw std::bad_alloc();
  }
  const std::size_t header = std::max(kHeader, alignment);
  char* memory = static_cast<char*>(std::aligned_alloc(header, (size + 2 * header - 1) / header * header));
  if (memory == nullptr) throw std::bad_alloc();
  memory[header - 1] = ours ? 1 : 0;
  if (ours) ++alive;
  return memory + header;
}

void release(void* memory, std::size_t alignment) noexcept {
  if (memory == nullptr) return;
  char* block = static_cast<char*>(memory);
  if (block[-1] == 1) --alive;
  std::free(block - std::max(kHeader, alignment));
}

std::size_t size_of(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, size_of(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, size_of(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { release(memory, 0); }
void operator delete[](void* memory) noexcept { release(memory, 0); }
void operator delete(void* memory, std::size_t) noexcept { release(memory, 0); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory, 0); }
void operator delete(void* memory, std::align_val_t alignment) noexcept { release(memory, size_of(alignment)); }
void operator delete[](void* memory, std::align_val_t alignment) noexcept { release(memory, size_of(alignment)); }
void operator delete(void* memory, std::size_t, std::align_val_t alignment) noexcept {
  release(memory, size_of(alignment));
}
void operator delete[](void* memory, std::size_t, std::align_val_t alignment) noexcept {
  release(memory, size_of(alignment));
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
extern "C" void* __libc_calloc(std::size_t, std::size_t);

/// What buffers are made of. Counted like operator new; their release is the heap's to show.
extern "C" void* calloc(std::size_t count, std::size_t size) {
  if (counting && tarflow_module.holds(__builtin_return_address(0)) && ++own == fails_at) return nullptr;
  return __libc_calloc(count, size);
}
#endif

namespace {

constexpr std::size_t kFreeLists = 16 << 10;
constexpr long kLateBlocks = 8;  // where two threads coincide for the first time
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr long kStride = 7;  // of the allocations that fail in turn: each is a sample, and slow here
constexpr int kFirstFailures = 25;
#else
constexpr long kStride = 1;
constexpr int kFirstFailures = 100;  // each opens a model
#endif

std::size_t heap() {
  const struct mallinfo2 info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

/// From here on the allocation of that number fails; 0 for none.
void let_fail(long failing, bool strange = false) {
  own = 0;
  fails_at = failing;
  strangely = strange;
}

struct Steps {
  std::vector<long> own_at;  // of each step, reserved before
  std::vector<std::int64_t> block;
};

class Run {
 public:
  explicit Run(const tarflow::Model& model, std::size_t n = 2)
      : images_(n * model.dims()), labels_(model.config().classes > 0 ? n : 0), n_(static_cast<std::int64_t>(n)) {
    tarflow::check(tarflow_sampler_create(model.get(), &sampler_));
    tarflow_sample_options_init(&options_);
    options_.denoise = model.config().noise_std > 0.0 ? 1 : 0;
    options_.guidance = labels_.empty() ? 0.0 : 1.0;
  }
  ~Run() { tarflow_sampler_free(sampler_); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  tarflow_sample_options& options() { return options_; }
  const std::vector<float>& images() const { return images_; }
  tarflow_status sample() {
    return tarflow_sampler_sample(sampler_, n_, labels_.empty() ? nullptr : labels_.data(), &options_, images_.data(),
                                  images_.size());
  }

 private:
  std::vector<float> images_;
  std::vector<std::int64_t> labels_;
  std::int64_t n_;
  tarflow_sampler* sampler_ = nullptr;
  tarflow_sample_options options_{};
};

/// The native kernel is looked at as time passes: enough images that it is while a block is inverted.
void test_steps(const tarflow::Model& model, bool native) {
  Run run(model, native ? 64 : 2);
  Steps steps;
  const auto total = static_cast<std::size_t>(model.config().blocks * (model.config().patches - 1));
  steps.own_at.reserve(total);
  steps.block.reserve(total);
  run.options().user_data = &steps;
  run.options().on_step = [](const tarflow_step* step, void* data) {
    auto* seen = static_cast<Steps*>(data);
    seen->own_at.push_back(own);
    seen->block.push_back(step->block);
    return 0;
  };
  CHECK(run.sample() == TARFLOW_OK);  // sessions are opened here
  steps.own_at.clear();
  steps.block.clear();
  own = 0;
  CHECK(run.sample() == TARFLOW_OK);
  CHECK(native || steps.own_at.size() == total);
  CHECK(own > 0);  // else it counts nothing
  int compared = 0;
  for (std::size_t i = 1; i < steps.own_at.size(); ++i) {
    if (steps.block[i] != steps.block[i - 1]) continue;
    ++compared;
    CHECK(steps.own_at[i] == steps.own_at[i - 1]);
  }
  CHECK(compared > 0);
  std::printf("allocations of libtarflow: 0 from step to step (%d times), %ld in all of a sample\n", compared,
              own.load());
}

void test_growth(const tarflow::Model& model, int samples) {
  Run run(model);
  for (int i = 0; i < 20; ++i) CHECK(run.sample() == TARFLOW_OK);
  const std::size_t before = heap();
  const long blocks = alive;
  for (int i = 0; i < samples; ++i) CHECK(run.sample() == TARFLOW_OK);
  const std::size_t after = heap();
  std::printf("heap: %zu bytes, after %d more samples %zu; %ld blocks of libtarflow more\n", before, samples, after,
              alive - blocks);
  CHECK(alive <= blocks + kLateBlocks);
  // ONNX Runtime's threads go on filling free lists of their own for a while.
  CHECK(after <= before + kFreeLists);
}

/// Each allocation of a sample fails in turn, until one needs no more. The sample says that there is no memory, or gets
/// on without, with one helper thread less. Returns how many there are, to kStride.
long fail_each(Run& run, const std::vector<float>& expected) {
  for (long failing = 1;; failing += kStride) {
    let_fail(failing);
    const tarflow_status status = run.sample();
    const bool reached = own >= failing;
    let_fail(0);
    const bool as_good = status == TARFLOW_OK && run.images() == expected;
    if (!as_good && !(reached && status == TARFLOW_ERROR_MEMORY)) {
      ++failures;
      std::fprintf(stderr, "allocation %ld failed, and the sample ended with %s: %s\n", failing,
                   tarflow_status_name(status), tarflow_last_message());
    }
    if (!reached || failures > 10) return failing - 1;
  }
}

/// Opening a model is left out: nlohmann/json allocates in a destructor, where a failure ends the program.
void test_failures(const tarflow::Model& model) {
  Run run(model);
  CHECK(run.sample() == TARFLOW_OK);
  const std::vector<float> expected = run.images();
  fail_each(run, expected);  // pools fill up, and the thread keeps the memory of its last message
  const std::size_t before = heap();
  const long blocks = alive;
  const long count = fail_each(run, expected);
  const std::size_t after = heap();
  std::printf("failed in turn: %ld allocations of a sample; heap %zu bytes, then %zu; %ld blocks of libtarflow more\n",
              count, before, after, alive - blocks);
  CHECK(count > 0 && alive == blocks);
  CHECK(after <= before + kFreeLists);
  let_fail(1, true);
  CHECK_FAILS(run.sample(), TARFLOW_ERROR_INTERNAL, "a strange failure");
  let_fail(0);
  CHECK(run.sample() == TARFLOW_OK && run.images() == expected);
}

/// The same for the first sample of a model, which opens its graphs: `kFirstFailures` of its allocations.
void test_first_failures(const char* bundle, const char* engine) {
  long count = 0;
  {
    const tarflow::Model model = open_on(engine, bundle);
    Run run(model);
    own = 0;
    CHECK(run.sample() == TARFLOW_OK);
    count = own;
  }
  const long blocks = alive;
  for (int i = 0; i < kFirstFailures && failures <= 10; ++i) {
    const tarflow::Model model = open_on(engine, bundle);
    Run run(model);
    let_fail(1 + count * i / kFirstFailures);
    const tarflow_status status = run.sample();
    let_fail(0);
    CHECK(status == TARFLOW_OK || status == TARFLOW_ERROR_MEMORY);
    CHECK(run.sample() == TARFLOW_OK);
  }
  std::printf("failed: %d of %ld allocations of a first sample\n", kFirstFailures, count);
  CHECK(alive == blocks);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  mallopt(M_ARENA_MAX, 1);  // mallinfo2 sees the main arena only
  return finish([&] {
    open_on("ort-cpu", argv[1]);  // loads ONNX Runtime
    void* frame[1];
    backtrace(frame, 1);  // its first call allocates
    tarflow_module = module_of("libtarflow.so");
    ort_module = module_of("libonnxruntime");
    CHECK(tarflow_module.begin != 0 && ort_module.begin != 0);
    counting = true;
    const tarflow::Model model = open_on(argv[2], argv[1]);
    test_steps(model, argv[2] == std::string("native"));
    test_growth(model, std::atoi(argv[3]));
    test_failures(model);
    test_first_failures(argv[1], argv[2]);
  });
}

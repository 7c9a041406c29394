// The C ABI: checks, the choice of a kernel, and how a batch is cut into groups of images.
#include "tarflow_native.h"

#include "../core/block.hpp"
#include "../core/pack.hpp"
#include "../core/team.hpp"
#include "threads.hpp"

using namespace tarflow_native;

namespace {

/// Most of any size, so that no count of bytes below leaves 64 bits.
constexpr i64 MOST_SIZE = i64{1} << 24, MOST_BYTES = sizeof(void *) == 8 ? i64{1} << 46 : i64{1} << 31;

/// Rows of a group of images that runs as one: below, the weights are read too often; above, the caches of keys and
/// values leave the last-level cache, which matters as long as the weights stay there.
constexpr i64 MOST_ROWS = 16, FEWEST_ROWS = 4, GROUP_CACHE_BYTES = i64{13} << 20;

/// Rows from which another thread pays: few rows wait for the weights, which each thread reads anew. 4 rows of the
/// digits took 9.1 ms whole and 8.6 cut in two, and on a busy machine 17 and 30; 16 rows 29 and 16, 57 and 31.
constexpr i64 THREAD_ROWS = 4;

/// The same where no last-level cache keeps a block's weights: 4 rows of 226 MB took 9 ms whole and 17 ms cut in two.
constexpr i64 LARGE_WEIGHT_BYTES = i64{24} << 20, LARGE_THREAD_ROWS = 8;

bool is_in(i64 value, i64 least, i64 most) { return value >= least && value <= most; }

bool is_valid(const Shape &shape) {
  const i64 sizes[] = {shape.patches, shape.values, shape.width, shape.layers, shape.head_dim};
  for (const i64 size : sizes)
    if (!is_in(size, 1, MOST_SIZE)) return false;
  if (shape.patches < 2 || !is_in(shape.classes, 0, MOST_SIZE) || !is_in(shape.nvp, 0, 1)) return false;
  if (shape.width % shape.head_dim != 0) return false;
  // In floating point, where nothing overflows: weights, embeddings, and the caches of one image.
  const double width = static_cast<double>(shape.width) + PANEL, patches = static_cast<double>(shape.patches) + LANES;
  const double layers = static_cast<double>(shape.layers), values = static_cast<double>(shape.values) + PANEL;
  const double rows = patches + static_cast<double>(shape.classes);
  const double bytes = 64 * width * (layers * width + values) + 8 * width * rows + 128 * layers * patches * width +
                       8 * patches * values;
  return bytes < static_cast<double>(MOST_BYTES);
}

bool format_of(const char *precision, Format *format) {
  if (!precision) return false;
  constexpr const char *NAMES[] = {"float32", "bfloat16", "int8"};
  for (int i = 0; i < 3; ++i) {
    if (!same(precision, NAMES[i])) continue;
    *format = static_cast<Format>(i);
    return true;
  }
  return false;
}

bool is_aligned(const void *pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % TARFLOW_NATIVE_ALIGNMENT == 0;
}

/// The n-th kernel that this machine runs, the best first; null past the last.
const Kernel *kernel_number(i64 number) {
#if defined(TARFLOW_NATIVE_X86_64)
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_v4 && __builtin_cpu_supports("avx512vnni") && number-- == 0) return &X86_64_V4_VNNI;
  if (has_v4 && number-- == 0) return &X86_64_V4;
  if (has_v3 && number-- == 0) return &X86_64_V3;
#elif defined(TARFLOW_NATIVE_AARCH64)
  if (number-- == 0) return &AARCH64;
#endif
  return number == 0 ? &PORTABLE : nullptr;
}

const Kernel *kernel_named(const char *name) {
  if (!name) return kernel_number(0);
  for (i64 i = 0; const Kernel *kernel = kernel_number(i); ++i)
    if (same(kernel->name, name)) return kernel;
  return nullptr;
}

/// How a batch is cut: into groups of at most `images`, that `threads` threads take one after the other. With fewer
/// groups than threads, each has a team of `members` that share its columns.
struct Groups {
  i64 images, count, threads, members;
};

Groups groups_of(const Shape &shape, i64 batch, i64 branches, i64 threads) {
  const Workspace row = workspace_of(shape, 1, 1);
  const i64 cache = shape.layers * (row.key_row + row.value_row) * 4;
  const i64 weights = (4 + 2 * MLP_EXPANSION) * shape.layers * shape.width * shape.width * 4;
  const i64 rows = larger(FEWEST_ROWS, smaller(MOST_ROWS, larger(GROUP_CACHE_BYTES, weights) / cache));
  const i64 most = larger(1, rows / branches);
  const i64 thread_rows = weights > LARGE_WEIGHT_BYTES ? LARGE_THREAD_ROWS : THREAD_ROWS;
  const i64 given = smaller(threads, MOST_THREADS);
  threads = smaller(given, round_up(branches * batch, thread_rows) / thread_rows);
  i64 count = round_up(batch, most) / most;
  count = smaller(round_up(count, threads), batch);
  const i64 images = round_up(batch, count) / count;
  count = round_up(batch, images) / images;
  threads = smaller(threads, count);
  const i64 members = count == threads ? larger(1, smaller(given / threads, most_members(shape))) : 1;
  return Groups{images, count, threads, members};
}

/// A team, and its workspace.
i64 workspace_of_group(const Shape &shape, i64 branches, const Groups &groups) {
  return static_cast<i64>(sizeof(Team)) + workspace_of(shape, branches * groups.images, groups.members).bytes;
}

Crowd crowd;

/// Rows of a tile of the forward pass: enough that the weights are not waited for, few enough that what lies between
/// two layers stays in the second-level cache. Tiles of one image begin at a multiple of LANES, where a block of keys
/// does.
constexpr i64 TILE_ROWS = 64;

/// Rows from which another thread pays in the forward pass.
constexpr i64 FORWARD_THREAD_ROWS = 16;

/// How a batch goes forward: in groups of `images`, each taken by one thread, or by several where there are fewer
/// images than threads.
struct PassGroups {
  i64 images, count, threads;
  bool shared;
  PassSpace space;

  i64 in_flight() const { return smaller(count, threads); }
  i64 bytes() const { return in_flight() * space.shared_bytes + threads * space.own_bytes; }
};

PassGroups pass_groups_of(const Shape &shape, i64 batch, i64 threads) {
  const i64 positions = shape.patches - 1;
  threads = smaller(smaller(threads, MOST_THREADS),
                    round_up(batch * positions, FORWARD_THREAD_ROWS) / FORWARD_THREAD_ROWS);
  PassGroups groups{};
  groups.images = larger(1, smaller(TILE_ROWS / positions, batch / threads));
  groups.count = round_up(batch, groups.images) / groups.images;
  groups.threads = threads;
  groups.shared = groups.count < threads; // then of one image each
  const i64 team = round_up(threads, groups.count) / groups.count;
  const i64 rows = round_up(groups.images * positions, LANES) / team / LANES * LANES;
  groups.space = pass_space_of(shape, groups.images, larger(LANES, smaller(TILE_ROWS, rows)), groups.shared ? 2 : 1);
  return groups;
}

/// What a packed block holds.
struct Opened {
  Shape shape;
  Layout layout;
};

tarflow_native_status open_packed(const void *packed, size_t bytes, Opened *opened) {
  Header header;
  if (!is_aligned(packed) || bytes < sizeof header) return TARFLOW_NATIVE_SMALL_BUFFER;
  __builtin_memcpy(&header, packed, sizeof header);
  bool is_packed = true;
  for (size_t i = 0; i < sizeof MAGIC; ++i) is_packed = is_packed && header.magic[i] == MAGIC[i];
  if (!is_packed || header.abi != TARFLOW_NATIVE_ABI || !is_valid(header.shape) || !is_in(header.format, 0, 2))
    return TARFLOW_NATIVE_NOT_PACKED;
  *opened = Opened{header.shape, layout_of(header.shape, static_cast<Format>(header.format))};
  return bytes < static_cast<size_t>(opened->layout.bytes) ? TARFLOW_NATIVE_SMALL_BUFFER : TARFLOW_NATIVE_OK;
}

/// Everything but the packed weights; OK where it is right.
tarflow_native_status check(const tarflow_native_run &run, const Shape &shape) {
  if (!run.noise || !run.x || !run.workspace || !is_in(run.batch, 1, MOST_SIZE) || !is_in(run.branches, 1, 2) ||
      !is_in(run.steps, 0, shape.patches - 1) || run.threads < 1 || (run.branches == 2 && !run.guidance) ||
      (run.labels == nullptr) != (shape.classes == 0))
    return TARFLOW_NATIVE_BAD_ARGUMENT;
  for (i64 i = 0; run.labels && i < run.branches * run.batch; ++i)
    if (!is_in(run.labels[i], 0, shape.classes)) return TARFLOW_NATIVE_BAD_ARGUMENT;
  const size_t needed = tarflow_native_workspace_bytes(&shape, run.batch, run.branches, run.threads);
  if (!is_aligned(run.workspace) || needed == 0 || run.workspace_bytes < needed) return TARFLOW_NATIVE_SMALL_BUFFER;
  return TARFLOW_NATIVE_OK;
}

tarflow_native_status check(const tarflow_native_pass &pass, const Shape &shape) {
  if (!pass.x || !pass.z || pass.x == pass.z || !pass.log_det || !pass.workspace ||
      !is_in(pass.batch, 1, MOST_SIZE) || pass.threads < 1 || (pass.labels == nullptr) != (shape.classes == 0))
    return TARFLOW_NATIVE_BAD_ARGUMENT;
  for (i64 i = 0; pass.labels && i < pass.batch; ++i)
    if (!is_in(pass.labels[i], 0, shape.classes)) return TARFLOW_NATIVE_BAD_ARGUMENT;
  const size_t needed = tarflow_native_forward_bytes(&shape, pass.batch, pass.threads);
  if (!is_aligned(pass.workspace) || needed == 0 || pass.workspace_bytes < needed) return TARFLOW_NATIVE_SMALL_BUFFER;
  return TARFLOW_NATIVE_OK;
}

} // namespace

extern "C" {

int32_t tarflow_native_abi(void) { return TARFLOW_NATIVE_ABI; }

const char *tarflow_native_kernel(int64_t number) {
  const Kernel *kernel = number < 0 ? nullptr : kernel_number(number);
  return kernel ? kernel->name : nullptr;
}

const char *tarflow_native_message(int32_t status) {
  switch (status) {
  case TARFLOW_NATIVE_OK: return "done";
  case TARFLOW_NATIVE_CANCELLED: return "cancelled";
  case TARFLOW_NATIVE_BAD_SHAPE: return "the shape is out of range, or the width is not a multiple of the head size";
  case TARFLOW_NATIVE_BAD_PRECISION: return "the precision is not float32, bfloat16 or int8";
  case TARFLOW_NATIVE_BAD_TENSOR: return "a tensor is missing, has another dtype or shape, or leaves the file";
  case TARFLOW_NATIVE_BAD_ORDER: return "the order of patches is neither forward nor reversed";
  case TARFLOW_NATIVE_SMALL_BUFFER: return "a buffer is too small, or does not begin at a multiple of 64 bytes";
  case TARFLOW_NATIVE_NOT_PACKED: return "the weights were not packed by this version";
  case TARFLOW_NATIVE_BAD_ARGUMENT: return "an argument is missing or out of range";
  case TARFLOW_NATIVE_BAD_KERNEL: return "no kernel of that name runs on this machine";
  default: return "unknown status";
  }
}

size_t tarflow_native_packed_bytes(const tarflow_native_shape *shape, const char *precision) {
  Format format;
  if (!shape || !is_valid(*shape) || !format_of(precision, &format)) return 0;
  return static_cast<size_t>(layout_of(*shape, format).bytes);
}

int32_t tarflow_native_pack(const tarflow_native_shape *shape, const char *precision,
                            const tarflow_native_tensor *tensors, int64_t count, const void *weights,
                            size_t weights_bytes, void *packed, size_t packed_bytes, const char **culprit) {
  Format format;
  if (!shape || !is_valid(*shape)) return TARFLOW_NATIVE_BAD_SHAPE;
  if (!format_of(precision, &format)) return TARFLOW_NATIVE_BAD_PRECISION;
  if (!tensors || count < 0 || !weights || !packed || weights_bytes > static_cast<size_t>(MOST_BYTES))
    return TARFLOW_NATIVE_BAD_ARGUMENT;
  if (!is_aligned(packed) || packed_bytes < static_cast<size_t>(layout_of(*shape, format).bytes))
    return TARFLOW_NATIVE_SMALL_BUFFER;
  const Weights from{tensors, count, static_cast<const unsigned char *>(weights), static_cast<i64>(weights_bytes)};
  return pack(*shape, format, from, static_cast<unsigned char *>(packed), culprit);
}

size_t tarflow_native_workspace_bytes(const tarflow_native_shape *shape, int64_t batch, int64_t branches,
                                      int64_t threads) {
  if (!shape || !is_valid(*shape) || !is_in(batch, 1, MOST_SIZE) || !is_in(branches, 1, 2) || threads < 1) return 0;
  const Groups groups = groups_of(*shape, batch, branches, threads);
  const i64 bytes = groups.threads * workspace_of_group(*shape, branches, groups);
  return bytes < MOST_BYTES ? static_cast<size_t>(bytes) : 0;
}

int32_t tarflow_native_invert(const tarflow_native_run *given) {
  if (!given || given->struct_size != sizeof(tarflow_native_run) || !given->packed) return TARFLOW_NATIVE_BAD_ARGUMENT;
  const tarflow_native_run &run = *given;
  Opened opened;
  tarflow_native_status status = open_packed(run.packed, run.packed_bytes, &opened);
  if (status != TARFLOW_NATIVE_OK) return status;
  const Shape &shape = opened.shape;
  const Kernel *kernel = kernel_named(run.kernel);
  if (!kernel) return TARFLOW_NATIVE_BAD_KERNEL;
  status = check(run, shape);
  if (status != TARFLOW_NATIVE_OK) return status;

  Groups groups = groups_of(shape, run.batch, run.branches, run.threads);
  const i64 bytes = workspace_of_group(shape, run.branches, groups), dims = shape.patches * shape.values;
  if (groups.members > 1 && crowd.is_near()) groups.members = 1;
  const auto place = [&](i64 thread) { return static_cast<unsigned char *>(run.workspace) + thread * bytes; };
  for (i64 thread = 0; thread < groups.threads; ++thread) {
    Team *team = reinterpret_cast<Team *>(place(thread));
    __builtin_memset(team, 0, sizeof *team);
    team->members = groups.members;
    team->opened = -1;
    team->yield = yield;
    team->now = now;
    team->began = now();
  }
  i64 next = 0, left = 0;
  int32_t cancelled = 0;
  const auto invert_group = [&](i64 group, i64 thread, i64 member) {
    const i64 first = group * groups.images;
    Images images{};
    images.shape = &shape;
    images.layout = &opened.layout;
    images.packed = static_cast<const unsigned char *>(run.packed);
    images.workspace = place(thread) + sizeof(Team);
    images.team = groups.members > 1 ? reinterpret_cast<Team *>(place(thread)) : nullptr;
    images.count = smaller(groups.images, run.batch - first);
    images.branches = run.branches;
    images.steps = run.steps;
    images.batch = run.batch;
    images.noise = run.noise + first * dims;
    images.x = run.x + first * dims;
    images.labels = run.labels ? run.labels + first : nullptr;
    images.guidance = run.branches == 2 ? run.guidance + first * 2 * shape.patches : nullptr;
    images.inverse_temperature = run.inverse_temperature ? run.inverse_temperature + first : nullptr;
    images.cancel = run.cancel;
    images.progress = run.progress;
    const bool is_done = kernel->invert(images, member);
    if (member != 0) return;
    if (images.team) __atomic_store_n(&images.team->ended, 1, __ATOMIC_RELAXED);
    if (!is_done) __atomic_store_n(&cancelled, 1, __ATOMIC_RELAXED);
  };
  side_by_side(groups.threads * groups.members, [&](i64 number) {
    const i64 thread = number / groups.members, member = number % groups.members;
    if (groups.members > 1) // a group for each thread, or its team
      invert_group(thread, thread, member);
    else
      for (i64 group; (group = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < groups.count;)
        invert_group(group, thread, 0);
    if (number == 0) left = now();
  });
  if (groups.members > 1) {
    Team &first = *reinterpret_cast<Team *>(place(0));
    if (groups.threads == 1) first.waited += now() - left; // for its members to end
    crowd.saw(is_crowded(first));
  }
  return cancelled ? TARFLOW_NATIVE_CANCELLED : TARFLOW_NATIVE_OK;
}

size_t tarflow_native_forward_bytes(const tarflow_native_shape *shape, int64_t batch, int64_t threads) {
  if (!shape || !is_valid(*shape) || !is_in(batch, 1, MOST_SIZE) || threads < 1) return 0;
  const i64 bytes = pass_groups_of(*shape, batch, threads).bytes();
  return bytes < MOST_BYTES ? static_cast<size_t>(bytes) : 0;
}

int32_t tarflow_native_forward(const tarflow_native_pass *given) {
  if (!given || given->struct_size != sizeof(tarflow_native_pass) || !given->packed) return TARFLOW_NATIVE_BAD_ARGUMENT;
  const tarflow_native_pass &pass = *given;
  Opened opened;
  tarflow_native_status status = open_packed(pass.packed, pass.packed_bytes, &opened);
  if (status != TARFLOW_NATIVE_OK) return status;
  const Shape &shape = opened.shape;
  const Kernel *kernel = kernel_named(pass.kernel);
  if (!kernel) return TARFLOW_NATIVE_BAD_KERNEL;
  status = check(pass, shape);
  if (status != TARFLOW_NATIVE_OK) return status;

  const PassGroups groups = pass_groups_of(shape, pass.batch, pass.threads);
  const PassSpace &space = groups.space;
  const i64 dims = shape.patches * shape.values;
  auto *workspace = static_cast<unsigned char *>(pass.workspace);
  const auto begin = [&](i64 slot) {
    __builtin_memset(workspace + slot * space.shared_bytes + space.state, 0, static_cast<size_t>(space.state_bytes));
  };
  for (i64 group = 0; groups.shared && group < groups.count; ++group) begin(group);
  i64 next = 0;
  int32_t cancelled = 0;
  side_by_side(groups.threads, [&](i64 thread) {
    // Where groups are shared, each thread takes part in one, and there is a place for each.
    for (i64 turn; (turn = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < larger(groups.count, groups.threads);) {
      const i64 group = turn % groups.count, slot = groups.shared ? group : thread, first = group * groups.images;
      if (!groups.shared) begin(slot);
      Pass images{};
      images.shape = &shape;
      images.layout = &opened.layout;
      images.packed = static_cast<const unsigned char *>(pass.packed);
      images.space = space;
      images.shared = workspace + slot * space.shared_bytes;
      images.own = workspace + groups.in_flight() * space.shared_bytes + thread * space.own_bytes;
      images.wait = yield;
      images.count = smaller(groups.images, pass.batch - first);
      images.x = pass.x + first * dims;
      images.z = pass.z + first * dims;
      images.log_det = pass.log_det + first;
      images.labels = pass.labels ? pass.labels + first : nullptr;
      images.cancel = pass.cancel;
      images.progress = pass.progress;
      if (!kernel->forward(images)) __atomic_store_n(&cancelled, 1, __ATOMIC_RELAXED);
    }
  });
  return cancelled ? TARFLOW_NATIVE_CANCELLED : TARFLOW_NATIVE_OK;
}

} // extern "C"

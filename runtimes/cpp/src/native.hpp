// NativeEngine: sequential decoding and encoding in the native kernel (runtimes/native), one call a block.
// The denoiser runs on ONNX Runtime.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "engine.hpp"
#include "ort_cpu.hpp"
#include "recent.hpp"

namespace tarflow::detail {

/// Memory that begins where the kernel wants it; as it comes, not zeroed.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(std::size_t size);
  void* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* memory) const noexcept;
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t size_ = 0;
};

class NativeEngine final : public Engine {
 public:
  /// `library` is where ONNX Runtime is loaded from when the denoiser needs it. Throws Error (ENGINE) when the kernel
  /// does not read the bundle.
  NativeEngine(std::shared_ptr<const Bundle> bundle, int threads, Logger logger, std::string library);
  /// Whether the kernel reads weights of that precision.
  static bool reads(const std::string& precision);

  const char* name() const override { return "native"; }
  const char* kernel() const override;
  void invert(const Turn& turn, Floats& patches) const override;
  Floats forward(std::int64_t block, const Floats& patches, const Labels& labels, const Call& call,
                 std::vector<double>& log_det) const override;
  Floats vjp(const Floats& patches, const Labels& labels, const Cotangent& cotangent,
             const Call& call) const override;
  void prepare_vjp() const override;

 private:
  std::shared_ptr<const AlignedBytes> packed(std::int64_t block) const;
  const Engine& ort_cpu() const;
  AlignedBytes take_workspace(std::size_t size) const;
  void give_workspace(AlignedBytes workspace) const;

  std::string library_;
  std::size_t packed_bytes_;
  mutable Recent<std::int64_t, const AlignedBytes> blocks_;
  mutable std::mutex mutex_;  // of what follows
  mutable std::vector<AlignedBytes> workspaces_;  // of earlier calls: at most as many as ever ran at once
  mutable std::unique_ptr<const OrtCpuEngine> ort_cpu_;
};

}  // namespace tarflow::detail

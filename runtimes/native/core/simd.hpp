/// Vectors of 16 float32 lanes, the same on every machine: one register of AVX-512, two of AVX2, four of NEON.
///
/// GCC's and Clang's vector extensions say everything but the fused multiply-add, the one line that differs by target.
#pragma once

#include <stdint.h>

#include "layout.hpp"

// The target, the bytes of a register, and how many registers there are.
#if !defined(TARFLOW_NATIVE_PORTABLE) && defined(__AVX512VNNI__)
#define TARFLOW_NATIVE_TARGET x86_64_v4_vnni
#define TARFLOW_NATIVE_REGISTERS 64, 32
#include <immintrin.h>
#elif !defined(TARFLOW_NATIVE_PORTABLE) && defined(__AVX512F__)
#define TARFLOW_NATIVE_TARGET x86_64_v4
#define TARFLOW_NATIVE_REGISTERS 64, 32
#include <immintrin.h>
#elif !defined(TARFLOW_NATIVE_PORTABLE) && defined(__AVX2__) && defined(__FMA__)
#define TARFLOW_NATIVE_TARGET x86_64_v3
#define TARFLOW_NATIVE_REGISTERS 32, 16
#include <immintrin.h>
#elif !defined(TARFLOW_NATIVE_PORTABLE) && defined(__aarch64__)
#define TARFLOW_NATIVE_TARGET aarch64
#define TARFLOW_NATIVE_REGISTERS 16, 32
#include <arm_neon.h>
#else
#define TARFLOW_NATIVE_TARGET portable
#define TARFLOW_NATIVE_REGISTERS 16, 16
#endif

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

struct Machine {
  int bytes, registers;
};
constexpr Machine MACHINE{TARFLOW_NATIVE_REGISTERS};
constexpr int REGISTER = MACHINE.bytes;
constexpr int PARTS = 64 / REGISTER;         ///< registers of a vector
constexpr int HELD = MACHINE.registers / PARTS; ///< vectors that all registers hold: 32, 8, 8, 4

typedef float FloatPart __attribute__((vector_size(REGISTER)));
typedef int32_t IntPart __attribute__((vector_size(REGISTER)));
typedef FloatPart AnyFloatPart __attribute__((aligned(4), may_alias));
typedef IntPart AnyIntPart __attribute__((aligned(4), may_alias));

struct Floats {
  FloatPart part[PARTS];
};
struct Ints {
  IntPart part[PARTS];
};

#define TARFLOW_NATIVE_INLINE static inline __attribute__((always_inline))
#define TARFLOW_NATIVE_PARTS for (int i = 0; i < PARTS; ++i)

/// a * b + c, rounded once.
#if !defined(TARFLOW_NATIVE_PORTABLE) && defined(__AVX512F__)
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) { return _mm512_fmadd_ps(a, b, c); }
#elif !defined(TARFLOW_NATIVE_PORTABLE) && defined(__AVX2__) && defined(__FMA__)
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) { return _mm256_fmadd_ps(a, b, c); }
#elif !defined(TARFLOW_NATIVE_PORTABLE) && defined(__aarch64__)
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) { return vfmaq_f32(c, a, b); }
#elif defined(__wasm__) && !defined(TARFLOW_NATIVE_EXACT)
// WebAssembly has none that rounds once for certain; -DTARFLOW_NATIVE_EXACT computes it as below, several times slower.
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) { return a * b + c; }
#elif defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF)
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) {
  for (int i = 0; i < REGISTER / 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
/// In float64 the product is exact; the sum is rounded to odd, so that rounding it to float32 is the only rounding.
/// Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums".
TARFLOW_NATIVE_INLINE float fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = static_cast<double>(c);
  double sum = product + addend;
  const double rest = sum - product, error = (product - (sum - rest)) + (addend - rest);
  int64_t bits;
  __builtin_memcpy(&bits, &sum, 8);
  if ((error < 0 || error > 0) && (bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  __builtin_memcpy(&sum, &bits, 8);
  return static_cast<float>(sum);
}
TARFLOW_NATIVE_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) {
  for (int i = 0; i < REGISTER / 4; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
#endif

TARFLOW_NATIVE_INLINE Floats fma(Floats a, Floats b, Floats c) {
  TARFLOW_NATIVE_PARTS c.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return c;
}

TARFLOW_NATIVE_INLINE Floats broadcast(float value) {
  Floats a;
  TARFLOW_NATIVE_PARTS a.part[i] = value - FloatPart{};
  return a;
}
TARFLOW_NATIVE_INLINE Floats load(const float *from) {
  Floats a;
  TARFLOW_NATIVE_PARTS a.part[i] = reinterpret_cast<const AnyFloatPart *>(from)[i];
  return a;
}
TARFLOW_NATIVE_INLINE Ints load(const uint32_t *from) {
  Ints a;
  TARFLOW_NATIVE_PARTS a.part[i] = reinterpret_cast<const AnyIntPart *>(from)[i];
  return a;
}
TARFLOW_NATIVE_INLINE void store(float *to, Floats a) {
  TARFLOW_NATIVE_PARTS reinterpret_cast<AnyFloatPart *>(to)[i] = a.part[i];
}

TARFLOW_NATIVE_INLINE Floats operator+(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS a.part[i] += b.part[i];
  return a;
}
TARFLOW_NATIVE_INLINE Floats operator-(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS a.part[i] -= b.part[i];
  return a;
}
TARFLOW_NATIVE_INLINE Floats operator*(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS a.part[i] *= b.part[i];
  return a;
}
TARFLOW_NATIVE_INLINE Floats operator/(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS a.part[i] /= b.part[i];
  return a;
}

/// a where it is below b, else b; and the other way round. A NaN in b stays.
TARFLOW_NATIVE_INLINE Floats minimum(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS b.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return b;
}
TARFLOW_NATIVE_INLINE Floats maximum(Floats a, Floats b) {
  TARFLOW_NATIVE_PARTS b.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return b;
}

/// |a|.
TARFLOW_NATIVE_INLINE Floats absolute(Floats a) { return maximum(a, broadcast(0.0F) - a); }

/// The same bits as another type.
TARFLOW_NATIVE_INLINE Ints as_ints(Floats a) {
  Ints b;
  TARFLOW_NATIVE_PARTS b.part[i] = reinterpret_cast<IntPart>(a.part[i]);
  return b;
}
TARFLOW_NATIVE_INLINE Floats as_floats(Ints a) {
  Floats b;
  TARFLOW_NATIVE_PARTS b.part[i] = reinterpret_cast<FloatPart>(a.part[i]);
  return b;
}
TARFLOW_NATIVE_INLINE Floats to_floats(Ints a) {
  Floats b;
  TARFLOW_NATIVE_PARTS b.part[i] = __builtin_convertvector(a.part[i], FloatPart);
  return b;
}
TARFLOW_NATIVE_INLINE Ints shift_left(Ints a, int by) {
  TARFLOW_NATIVE_PARTS a.part[i] = reinterpret_cast<IntPart>(a.part[i] << by);
  return a;
}
TARFLOW_NATIVE_INLINE Ints shift_right(Ints a, int by) {
  TARFLOW_NATIVE_PARTS a.part[i] >>= by;
  return a;
}
TARFLOW_NATIVE_INLINE Ints operator+(Ints a, Ints b) {
  TARFLOW_NATIVE_PARTS a.part[i] += b.part[i];
  return a;
}
TARFLOW_NATIVE_INLINE Ints operator-(Ints a, Ints b) {
  TARFLOW_NATIVE_PARTS a.part[i] -= b.part[i];
  return a;
}
TARFLOW_NATIVE_INLINE Ints bits_and(Ints a, int32_t mask) {
  TARFLOW_NATIVE_PARTS a.part[i] &= mask;
  return a;
}
TARFLOW_NATIVE_INLINE Ints broadcast_int(int32_t value) {
  Ints a;
  TARFLOW_NATIVE_PARTS a.part[i] = value - IntPart{};
  return a;
}

/// The lowest bytes of the lanes.
TARFLOW_NATIVE_INLINE void store_bytes(int8_t *to, Ints a) {
  typedef int8_t BytePart __attribute__((vector_size(REGISTER / 4)));
  TARFLOW_NATIVE_PARTS {
    const BytePart bytes = __builtin_convertvector(a.part[i], BytePart);
    __builtin_memcpy(to + i * (REGISTER / 4), &bytes, REGISTER / 4);
  }
}

/// Whether four products of bytes are one instruction; and that: sum + the products of 4 unsigned bytes of each lane of
/// `a` with the 4 signed bytes of `b`.
#if defined(__AVX512VNNI__)
constexpr bool HAS_DOT = true;
TARFLOW_NATIVE_INLINE Ints dot(Ints sum, Ints a, int32_t b) {
  const auto before = reinterpret_cast<__m512i>(sum.part[0]), bytes = reinterpret_cast<__m512i>(a.part[0]);
  sum.part[0] = reinterpret_cast<IntPart>(_mm512_dpbusd_epi32(before, bytes, _mm512_set1_epi32(b)));
  return sum;
}
#else
constexpr bool HAS_DOT = false;
TARFLOW_NATIVE_INLINE Ints dot(Ints sum, Ints, int32_t) { return sum; }
#endif

/// a in the first `count` lanes, b in the others.
TARFLOW_NATIVE_INLINE Floats first_lanes(Floats a, i64 count, Floats b) {
  static constexpr int32_t NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Ints lane = load(reinterpret_cast<const uint32_t *>(NUMBERS));
  const Ints end = broadcast_int(static_cast<int32_t>(count < LANES ? count : LANES));
  TARFLOW_NATIVE_PARTS b.part[i] = lane.part[i] < end.part[i] ? a.part[i] : b.part[i];
  return b;
}

/// The lanes folded in halves: lane i with lane i + 8, then with i + 4, i + 2, i + 1.
TARFLOW_NATIVE_INLINE float sum_of_lanes(Floats a) {
  float lane[LANES];
  store(lane, a);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
TARFLOW_NATIVE_INLINE int32_t sum_of_lanes(Ints a) {
  int32_t lane[LANES];
  __builtin_memcpy(lane, &a, sizeof lane);
  int32_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += lane[i];
  return sum;
}
TARFLOW_NATIVE_INLINE float largest_lane(Floats a) {
  float lane[LANES];
  store(lane, a);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

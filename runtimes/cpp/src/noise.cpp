// This file is compiled with -ffp-contract=off: a fused multiply-add would change the bits.
#include "noise.hpp"

#include <cfloat>
#include <cmath>
#include <cstddef>

static_assert(FLT_EVAL_METHOD == 0, "the noise needs arithmetic without wider intermediate results");

namespace tarflow::detail {
namespace {

constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kHalfPi = 0x1.921fb54442d18p+0;
constexpr double kLog[] = {0x1.642c8590b2164p-5, 0x1.8618618618618p-5, 0x1.af286bca1af28p-5, 0x1.e1e1e1e1e1e1ep-5,
                           0x1.1111111111111p-4, 0x1.3b13b13b13b14p-4, 0x1.745d1745d1746p-4, 0x1.c71c71c71c71cp-4,
                           0x1.2492492492492p-3, 0x1.999999999999ap-3, 0x1.5555555555555p-2, 0x1p+0};
constexpr double kSin[] = {-0x1.ae7f3e733b81fp-41, 0x1.6124613a86d09p-33, -0x1.ae64567f544e4p-26,
                           0x1.71de3a556c734p-19,  -0x1.a01a01a01a01ap-13, 0x1.1111111111111p-7,
                           -0x1.5555555555555p-3,  0x1p+0};
constexpr double kCos[] = {0x1.ae7f3e733b81fp-45, -0x1.93974a8c07c9dp-37, 0x1.1eed8eff8d898p-29,
                           -0x1.27e4fb7789f5cp-22, 0x1.a01a01a01a01ap-16, -0x1.6c16c16c16c17p-10,
                           0x1.5555555555555p-5,  -0x1p-1,                0x1p+0};

template <std::size_t Count>
double horner(const double (&coefficients)[Count], double x) {
  double value = coefficients[0];
  for (std::size_t i = 1; i < Count; ++i) {
    value = value * x;
    value = value + coefficients[i];
  }
  return value;
}

void box_muller(std::uint32_t radius_word, std::uint32_t angle_word, float* pair) {
  int exponent = 0;
  double fraction = std::frexp(static_cast<double>(2 * static_cast<std::uint64_t>(radius_word) + 1), &exponent);
  if (fraction < kSqrtHalf) {
    fraction = fraction * 2.0;
    exponent = exponent - 1;
  }
  const double s = (fraction - 1.0) / (fraction + 1.0);
  const double log_u = static_cast<double>(exponent - 33) * kLn2 + (s * 2.0) * horner(kLog, s * s);
  const double radius = std::sqrt(log_u * -2.0);

  const double turn = (static_cast<double>(angle_word & 0x3FFFFFFFU) + 0.5) * 0x1p-30;
  const double angle = (turn - 0.5) * kHalfPi;
  const double square = angle * angle;
  const double sine = angle * horner(kSin, square);
  const double cosine = horner(kCos, square);
  double x = cosine;
  double y = sine;
  switch (angle_word >> 30) {
    case 1: x = -sine; y = cosine; break;
    case 2: x = -cosine; y = -sine; break;
    case 3: x = sine; y = -cosine; break;
    default: break;
  }
  pair[0] = static_cast<float>(radius * x);
  pair[1] = static_cast<float>(radius * y);
}

}  // namespace

Words philox(Words c, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p = std::uint64_t{0xD2511F53U} * c[0];
    const std::uint64_t q = std::uint64_t{0xCD9E8D57U} * c[2];
    c = {static_cast<std::uint32_t>(q >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(q),
         static_cast<std::uint32_t>(p >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p)};
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return c;
}

void standard_normal(std::uint64_t seed, std::uint64_t image, std::int64_t values, float* out) {
  for (std::int64_t first = 0; first < values; first += 4) {
    const Words w = philox({static_cast<std::uint32_t>(first / 4), 0, static_cast<std::uint32_t>(image),
                            static_cast<std::uint32_t>(image >> 32)},
                           static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    float normals[4];
    box_muller(w[0], w[1], normals);
    box_muller(w[2], w[3], normals + 2);
    for (std::int64_t i = 0; i < 4 && first + i < values; ++i) out[first + i] = normals[i];
  }
}

}  // namespace tarflow::detail

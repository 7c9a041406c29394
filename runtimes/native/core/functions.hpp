/// exp and GELU of 16 lanes. The coefficients are those of tools/fit.py.
#pragma once

#include "simd.hpp"

namespace tarflow_native::TARFLOW_NATIVE_TARGET {

/// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2, exp(r) ~ 1 + r + r^2 p(r).
///
/// 2^n is multiplied in two halves, so that the result runs over to infinity and under to 0 as it should. The largest
/// error seen is 1.0 ulp.
TARFLOW_NATIVE_INLINE Floats exp(Floats x) {
  x = maximum(broadcast(-104.0F), minimum(broadcast(89.0F), x));
  const Floats magic = broadcast(12582912.0F); // 1.5 * 2^23: what is added to it is rounded to an integer
  const Floats shifted = fma(x, broadcast(1.44269504F), magic);
  const Floats rounded = shifted - magic;
  Floats r = fma(rounded, broadcast(-0.693145752F), x); // ln 2 in two parts, the first of 16 bits
  r = fma(rounded, broadcast(-1.42860682e-6F), r);
  Floats p = broadcast(0.0013814613F);
  p = fma(p, r, broadcast(0.00836871F));
  p = fma(p, r, broadcast(0.04166839F));
  p = fma(p, r, broadcast(0.16666521F));
  p = fma(p, r, broadcast(0.49999994F));
  p = fma(p, r * r, r) + broadcast(1.0F);
  const Ints n = as_ints(shifted) - as_ints(magic), bias = broadcast_int(127);
  const Ints half = shift_right(n, 1), other = n - half;
  return p * as_floats(shift_left(half + bias, 23)) * as_floats(shift_left(other + bias, 23));
}

/// gelu(x) = x/2 (1 + erf(x / sqrt 2)), erf(x / sqrt 2) ~ x p(x^2) / q(x^2) where it is not 1 in float32.
TARFLOW_NATIVE_INLINE Floats gelu(Floats x) {
  const Floats u = maximum(broadcast(-5.56F), minimum(broadcast(5.56F), x)), t = u * u;
  Floats p = broadcast(2.1875075e-10F);
  p = fma(p, t, broadcast(-4.3200057e-08F));
  p = fma(p, t, broadcast(6.3016487e-06F));
  p = fma(p, t, broadcast(0.00033075284F));
  p = fma(p, t, broadcast(0.008963732F));
  p = fma(p, t, broadcast(0.0710423F));
  p = fma(p, t, broadcast(0.7978845F));
  Floats q = broadcast(6.031767e-05F);
  q = fma(q, t, broadcast(0.0018047413F));
  q = fma(q, t, broadcast(0.028854022F));
  q = fma(q, t, broadcast(0.2557041F));
  q = fma(q, t, broadcast(1.0F));
  const Floats half = x * broadcast(0.5F);
  return fma(half, u * p / q, half);
}

} // namespace tarflow_native::TARFLOW_NATIVE_TARGET

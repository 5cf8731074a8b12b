// exp of floats in a loop that the compiler turns into vectors, which it cannot do with the library's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../math.h"

namespace nft {
namespace NFT_ISA {

// Within 2 ulp; below -87.3, where the result would be subnormal, it is that of -87.3, and above 88 that of 88.
inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
  // Adding 1.5 2^23 leaves the nearest integer in the low bits.
  const float shifted = fused(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
  // ln 2 in two parts, the first short enough for its multiples to be exact.
  const float r = fused(n, -0x1.7f7d1cp-20f, fused(n, -0x1.62e4p-1f, x));
  float p = 0.0013893894f;
  p = fused(p, r, 0.008376321f);
  p = fused(p, r, 0.041668788f);
  p = fused(p, r, 0.16666524f);
  p = fused(p, r, 0.4999999f);
  p = fused(p, r, 1.0f);
  p = fused(p, r, 1.0f);
  uint32_t bits, power;
  std::memcpy(&power, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += power << 23;
  std::memcpy(&p, &bits, 4);
  // The bits of a NaN were added to as well.
  return p + (x - x);
}
inline double exponential(double x) { return std::exp(x); }

// x / (1 + exp(z)). Where exp of floats is clamped it has to become infinite: x itself has no bound.
template <typename T>
T damped(T x, T z) {
  return x / (1 + (sizeof(T) == 4 && z > 88 ? std::numeric_limits<T>::infinity() : exponential(z)));
}

}  // namespace NFT_ISA
}  // namespace nft

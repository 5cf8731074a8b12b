// Formulas shared by the host and the device: the counter-based noise and the per-element errors of the loss.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NFT_HD __host__ __device__ __forceinline__
#else
#define NFT_HD inline
#endif

namespace nft {

struct Philox {
  uint32_t v[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
NFT_HD Philox philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Philox c{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
            static_cast<uint32_t>(high >> 32)}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c.v[0], p1 = 0xCD9E8D57ull * c.v[2];
    c = Philox{{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Four standard normals from one counter. The uniforms are (24 high bits + 1/2) / 2^24, never 0 or 1.
NFT_HD void normals(uint64_t seed, uint64_t sample, uint64_t block, float out[4]) {
  const Philox bits = philox(seed, block, sample);
  for (int pair = 0; pair < 2; ++pair) {
    const float u1 = (static_cast<float>(bits.v[2 * pair] >> 8) + 0.5f) * 0x1p-24f;
    const float u2 = (static_cast<float>(bits.v[2 * pair + 1] >> 8) + 0.5f) * 0x1p-24f;
    const float radius = sqrtf(-2.0f * logf(u1)), angle = 6.283185307179586f * u2;
    out[2 * pair] = radius * cosf(angle);
    out[2 * pair + 1] = radius * sinf(angle);
  }
}

// Errors of the two x0 predictions: e+ = x_t - t v+ - x0 and e- likewise, written without a division by t.
template <typename T>
NFT_HD void errors(T v_theta, T v_old, T x_t, T x0, T t, T t_beta, T& d, T& positive, T& negative) {
  d = v_theta - v_old;
  const T base = (x_t - x0) - t * v_old, push = t_beta * d;
  positive = base - push;
  negative = base + push;
}

}  // namespace nft

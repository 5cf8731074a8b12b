// Formulas shared by the host and the device: the counter-based noise, and the loss of an element and of a sample.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "args.h"

namespace nft {

struct Philox {
  uint32_t v[4];
};

// Philox4x32-10 (Salmon et al., SC 2011). Without a loop of rounds, so that compilers can compute several at a time.
NFT_HD Philox philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Philox c{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
            static_cast<uint32_t>(high >> 32)}};
  auto round = [&] {
    const uint64_t p0 = 0xD2511F53ull * c.v[0], p1 = 0xCD9E8D57ull * c.v[2];
    c = Philox{{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  };
  round(), round(), round(), round(), round();
  round(), round(), round(), round(), round();
  return c;
}

// Cosine and sine of an angle in [0, 2 pi], within an ulp of 1. The library's cannot know that range: on the device
// they carry the reduction of huge angles, which needs memory, and each library rounds in its own way.
NFT_HD void cos_sin(float angle, float& cosine, float& sine) {
  const int quarter = static_cast<int>(angle * 0.63661977f + 0.5f);
  // pi/2 in two parts, the first short enough for its multiples to be exact.
  const float y = (angle - quarter * 0x1.921fap+0f) - quarter * 0x1.54442ep-20f, y2 = y * y;
  const float s = y + y * y2 * (-0.16666655f + y2 * (0.008332177f + y2 * -0.0001951717f));
  const float c = (1.0f - 0.5f * y2) + y2 * y2 * (0.041666646f + y2 * (-0.0013887367f + y2 * 2.4438306e-05f));
  const bool odd = quarter & 1;
  cosine = (quarter + 1) & 2 ? -(odd ? s : c) : (odd ? s : c);
  sine = quarter & 2 ? -(odd ? c : s) : (odd ? c : s);
}

// Natural logarithm of a number from 2^-25 to 1, within an ulp. The library's also looks for what is none, and takes one
// number at a time.
NFT_HD float log_of_uniform(float u) {
  int32_t bits;
  memcpy(&bits, &u, 4);
  // u = 2^exponent (1 + y), with 1 + y from sqrt(1/2) to sqrt(2).
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent * (1 << 23);
  float y;
  memcpy(&y, &bits, 4);
  y -= 1.0f;
  float p = 0.12761575f + y * -0.07634493f;
  p = 0.14201759f + y * (-0.13160183f + y * p);
  p = 0.33333331f + y * (-0.2500082f + y * (0.20001227f + y * (-0.16623357f + y * p)));
  // ln 2 in two parts, the first short enough for its multiples to be exact.
  const float n = static_cast<float>(exponent), y2 = y * y;
  return (y + ((y * y2 * p + n * -2.1219444e-4f) - 0.5f * y2)) + n * 0.693359375f;
}

// Four standard normals from one counter. The uniforms are (24 high bits + 1/2) / 2^24, never 0.
NFT_HD void normals(uint64_t seed, uint64_t sample, uint64_t block, float out[4]) {
  const Philox bits = philox(seed, block, sample);
  // Signed, as processors convert a vector of these.
  auto uniform = [](uint32_t word) { return (static_cast<float>(static_cast<int32_t>(word >> 8)) + 0.5f) * 0x1p-24f; };
  auto box_muller = [&](uint32_t radial, uint32_t angular, float& first, float& second) __attribute__((always_inline)) {
    const float radius = sqrtf(-2.0f * log_of_uniform(uniform(radial)));
    float cosine, sine;
    cos_sin(6.283185307179586f * uniform(angular), cosine, sine);
    first = radius * cosine;
    second = radius * sine;
  };
  box_muller(bits.v[0], bits.v[1], out[0], out[1]);
  box_muller(bits.v[2], bits.v[3], out[2], out[3]);
}

// NaN for what is not within [0, 1]: where nobody has looked at a number, only the result can tell that it is wrong.
NFT_HD double unit(double x) { return x >= 0 && x <= 1 ? x : NAN; }

// One sample's numbers: `loss_weight` is what it counts in the loss.
struct Sample {
  double t, r, beta, loss_weight;
};

// x0_hat = keep x_t + push p for what the model predicts, p; step = push beta.
template <typename T>
struct Affine {
  T keep, push, step;
};

template <typename T>
NFT_HD Affine<T> affine(int prediction, double t, double beta) {
  if (prediction == kVelocity) return {T(1), static_cast<T>(-t), static_cast<T>(-t * beta)};
  if (prediction == kX0) return {T(0), T(1), static_cast<T>(beta)};
  // Divided in T: a division of doubles takes a GPU many registers.
  const T rest = static_cast<T>(1 - t), push = static_cast<T>(-t) / rest;
  return {T(1) / rest, push, push * static_cast<T>(beta)};
}

// Turns a difference of predictions, squared, into that of the velocities or of the x0 predictions.
NFT_HD double kl_factor(int prediction, bool in_x0, double t) {
  const double to_x0 = prediction == kVelocity ? t : prediction == kX0 ? 1.0 : t / (1 - t);
  const double to_v = prediction == kVelocity ? 1.0 : prediction == kX0 ? 1 / t : 1 / (1 - t);
  return in_x0 ? to_x0 * to_x0 : to_v * to_v;
}

// a b + c, rounded once where the processor can. Only where no other product has to cancel this one to the last bit: of
// a b - c d two would not, and so the compiler itself contracts nothing.
template <typename T>
NFT_HD T fused(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  // std::fma of floats is a function of the host, and on a device does nothing.
  if constexpr (sizeof(T) == sizeof(float))
    return __fmaf_rn(a, b, c);
  else
    return __fma_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// What the errors of the two x0 predictions are made of, e+ = base + step d and e- = base - step d.
template <typename T>
NFT_HD void errors(T p_theta, T p_old, T x_t, T x0, const Affine<T>& f, T& d, T& base) {
  d = p_theta - p_old;
  base = fused(f.push, p_old, fused(f.keep, x_t, -x0));
}

// Sums over elements, from which everything per sample follows.
template <typename T>
struct Sums {
  T positive_abs, negative_abs, positive_sq, negative_sq, kl, d_abs, d_max;

  template <typename U>
  NFT_HD void add(const Sums<U>& o) {
    positive_abs += o.positive_abs;
    negative_abs += o.negative_abs;
    positive_sq += o.positive_sq;
    negative_sq += o.negative_sq;
    kl += o.kl;
    d_abs += o.d_abs;
    // A NaN, which compares false, must not be lost.
    d_max = (o.d_max > d_max || o.d_max != o.d_max) ? o.d_max : d_max;
  }
};

// Those of a sample whose elements do not count alike: also the sums of the mask, and of r e+^2 and (1-r) e-^2 by what
// each element counts in the policy loss.
template <typename T>
struct WeightedSums {
  Sums<T> all;
  T size, positive, negative;

  template <typename U>
  NFT_HD void add(const WeightedSums<U>& o) {
    all.add(o.all);
    size += o.size;
    positive += o.positive;
    negative += o.negative;
  }
};

// Whether elements of a sample count differently or the gradient flows through the weights: that takes WeightedSums.
NFT_HD bool elementwise(const LossArgs& a) {
  return a.has_mask || a.has_policy_weight || a.r_per_element || !a.detach_weight;
}

// Where the elements of sample b are; packed tensors are one row, of which the samples are parts.
struct Part {
  int64_t row, start, length;
};

NFT_HD Part part_of(const LossArgs& a, int64_t b) {
  if (!a.offsets) return {b, 0, a.elements};
  return {0, a.offsets[b] * a.elements, (a.offsets[b + 1] - a.offsets[b]) * a.elements};
}

// Factors in the gradient of e+, e-, v_theta - v_ref, and, where it flows through the weights, of the errors' signs.
struct Coefficients {
  double positive, negative, kl, positive_sign, negative_sign;
};

// d loss / d v_theta of an element without the KL term. `of_policy` is what it counts in the policy loss, and `mask` in
// the weights w.
template <typename T>
NFT_HD T policy_gradient(const Coefficients& c, T mask, T of_policy, T r, T positive, T negative) {
  auto sign = [](T x) { return static_cast<T>((x > 0) - (x < 0)); };
  return of_policy * (r * (static_cast<T>(c.positive) * positive) +
                      (1 - r) * (static_cast<T>(c.negative) * negative)) +
         mask * (static_cast<T>(c.positive_sign) * sign(positive) + static_cast<T>(c.negative_sign) * sign(negative));
}

NFT_HD double time_weighting(int weighting, double t) {
  switch (weighting) {
    case kTime:
      return t;
    case kTimeSquared:
      return t * t;
    case kOverTime:
      return 1 / t;
    case kOverTimeSquared:
      return 1 / (t * t);
    case kLeftOverTimeSquared:
      return (1 - t) / (t * t);
    default:
      return 1;
  }
}

// w+ or w- for a mean of |e|.
NFT_HD double branch_weight(int weighting, double mean_abs) {
  return weighting != kAdaptive ? 1.0 : mean_abs < 1e-5 ? 1e-5 : mean_abs;
}

// What one sample comes to: its details, and the gradient's coefficients before r and the mask.
NFT_HD Coefficients finish(const LossArgs& a, const Sample& sample, const WeightedSums<double>& sums,
                           double (&details)[kDetails]) {
  const Sums<double>& s = sums.all;
  // A GPU waits for divisions.
  const double share = 1 / (sums.size > 0 ? sums.size : 1.0);
  const double weighting = time_weighting(a.weighting, sample.t), factor = a.adv_clip_max * weighting * share;
  const double positive_mean = s.positive_abs * share, negative_mean = s.negative_abs * share;
  const double w_positive = branch_weight(a.weighting, positive_mean), over_positive = 1 / w_positive;
  const double w_negative = branch_weight(a.weighting, negative_mean), over_negative = 1 / w_negative;
  const double kl = kl_factor(a.prediction, a.kl_in_x0, sample.t);
  details[0] = factor * (sums.positive * over_positive + sums.negative * over_negative) / sample.beta;
  details[1] = weighting * s.positive_sq * share * over_positive;
  details[2] = weighting * s.negative_sq * share * over_negative;
  details[3] = w_positive;
  details[4] = w_negative;
  details[5] = a.has_ref ? kl * s.kl * share : 0.0;
  details[6] = s.d_abs * share;
  details[7] = s.d_max;
  const double common = factor * affine<double>(a.prediction, sample.t, sample.beta).push * sample.loss_weight;
  Coefficients c{2 * common * over_positive, -2 * common * over_negative,
                 2 * a.kl_weight * kl * sample.loss_weight * share, 0, 0};
  if (!a.detach_weight) {
    // The clamped weight is a constant.
    if (w_positive == positive_mean) c.positive_sign = -common * sums.positive * share * over_positive * over_positive;
    if (w_negative == negative_mean) c.negative_sign = common * sums.negative * share * over_negative * over_negative;
  }
  return c;
}

// The same where all elements of a sample count alike; the coefficients then hold r.
NFT_HD Coefficients finish(const LossArgs& a, const Sample& sample, const Sums<double>& s, int64_t elements,
                           double (&details)[kDetails]) {
  const double r = sample.r;
  Coefficients c =
      finish(a, sample, {s, static_cast<double>(elements), r * s.positive_sq, (1 - r) * s.negative_sq}, details);
  c.positive *= r;
  c.negative *= 1 - r;
  return c;
}

NFT_HD float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// The nearest bfloat16 in the upper half; the lower one means nothing.
NFT_HD uint32_t round_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1);
}

NFT_HD uint16_t to_bf16(float value) { return static_cast<uint16_t>(round_to_bf16(value) >> 16); }

}  // namespace nft

// CPU kernels, compiled once per instruction set (NFT_ISA names the namespace).
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "math.h"

namespace nft {
namespace NFT_ISA {
namespace {

// One chunk of all inputs fits the first-level cache, and partial sums per chunk make the result independent of
// the number of threads.
constexpr int64_t kChunk = 2048;
constexpr int kLanes = 16;

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_fp16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff, wide;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -small : small;
  }
  wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
#endif
}

inline uint16_t to_fp16(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  bits += 0xfffu + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
#endif
}

template <typename T>
inline T load_one(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat32: return static_cast<T>(static_cast<const float*>(data)[i]);
    case kBFloat16: return static_cast<T>(from_bf16(static_cast<const uint16_t*>(data)[i]));
    case kFloat16: return static_cast<T>(from_fp16(static_cast<const uint16_t*>(data)[i]));
    default: return static_cast<T>(static_cast<const double*>(data)[i]);
  }
}

inline double value(const Vector& x, int64_t b) { return load_one<double>(x.data, x.dtype, b * x.stride); }

template <typename T>
inline void store_one(void* data, int dtype, int64_t i, T value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case kBFloat16: static_cast<uint16_t*>(data)[i] = to_bf16(static_cast<float>(value)); break;
    case kFloat16: static_cast<uint16_t*>(data)[i] = to_fp16(static_cast<float>(value)); break;
    default: static_cast<double*>(data)[i] = static_cast<double>(value);
  }
}

// Calls body(offset, index) for elements [start, start + count) of one sample, in logical order.
template <typename F>
inline void walk(const View& view, int64_t start, int64_t count, F body) {
  int64_t index[kMaxDims] = {0}, rest = start, offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    index[d] = rest % view.size[d];
    rest /= view.size[d];
    offset += index[d] * view.stride[d];
  }
  for (int64_t k = 0; k < count; ++k) {
    body(offset, k);
    for (int d = view.dims - 1; d >= 0; --d) {
      offset += view.stride[d];
      if (++index[d] < view.size[d]) break;
      offset -= view.size[d] * view.stride[d];
      index[d] = 0;
    }
  }
}

inline int item_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline char* sample_start(const View& view, int64_t b) {
  return static_cast<char*>(view.data) + b * view.batch_stride * item_size(view.dtype);
}

inline bool dense(const View& view) { return view.dims == 0 || (view.dims == 1 && view.stride[0] == 1); }

// The chunk as compute-type values: the tensor's own memory when it already is that, else a converted copy.
template <typename T>
const T* load(const View& view, int64_t b, int64_t start, int64_t count, T* buffer) {
  const char* base = sample_start(view, b);
  if (!dense(view)) {
    walk(view, start, count, [&](int64_t o, int64_t k) { buffer[k] = load_one<T>(base, view.dtype, o); });
    return buffer;
  }
  if (view.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) return reinterpret_cast<const T*>(base) + start;
  if (view.dtype == kBFloat16) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(base) + start;
    for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(from_bf16(source[k]));
    return buffer;
  }
  int64_t k = 0;
#if defined(__F16C__)
  if (view.dtype == kFloat16 && sizeof(T) == 4) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(base) + start;
    for (; k + 8 <= count; k += 8)
      _mm256_storeu_ps(reinterpret_cast<float*>(buffer) + k,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k))));
  }
#endif
  for (; k < count; ++k) buffer[k] = load_one<T>(base, view.dtype, start + k);
  return buffer;
}

template <typename T>
void store(const View& view, int64_t b, int64_t start, int64_t count, const T* values) {
  char* base = sample_start(view, b);
  if (!dense(view)) {
    walk(view, start, count, [&](int64_t o, int64_t k) { store_one<T>(base, view.dtype, o, values[k]); });
  } else if (view.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) {
    std::memcpy(reinterpret_cast<T*>(base) + start, values, count * sizeof(T));
  } else if (view.dtype == kBFloat16) {
    uint16_t* target = reinterpret_cast<uint16_t*>(base) + start;
    for (int64_t k = 0; k < count; ++k) target[k] = to_bf16(static_cast<float>(values[k]));
  } else {
    for (int64_t k = 0; k < count; ++k) store_one<T>(base, view.dtype, start + k, values[k]);
  }
}

struct Sums {
  double positive_abs = 0, negative_abs = 0, positive_sq = 0, negative_sq = 0, kl = 0, d_abs = 0, d_max = 0;
  void add(const Sums& o) {
    positive_abs += o.positive_abs;
    negative_abs += o.negative_abs;
    positive_sq += o.positive_sq;
    negative_sq += o.negative_sq;
    kl += o.kl;
    d_abs += o.d_abs;
    d_max = (o.d_max > d_max || std::isnan(o.d_max)) ? o.d_max : d_max;
  }
};

template <typename T>
double total(const T* lanes) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

template <typename T>
struct Buffers {
  alignas(64) T v_theta[kChunk], v_old[kChunk], x_t[kChunk], x0[kChunk], v_ref[kChunk], grad[kChunk];
};

template <typename T>
Sums chunk_sums(const LossArgs& a, int64_t b, int64_t start, int64_t count, Buffers<T>& buf) {
  const T* v_theta = load(a.v_theta, b, start, count, buf.v_theta);
  const T* v_old = load(a.v_old, b, start, count, buf.v_old);
  const T* x_t = load(a.x_t, b, start, count, buf.x_t);
  const T* x0 = load(a.x0, b, start, count, buf.x0);
  const T t = static_cast<T>(value(a.t, b)), t_beta = static_cast<T>(value(a.t, b) * value(a.beta, b));
  T pa[kLanes] = {0}, na[kLanes] = {0}, ps[kLanes] = {0}, ns[kLanes] = {0}, da[kLanes] = {0}, dm[kLanes] = {0};
  auto one = [&](int64_t k, int l) {
    T d, positive, negative;
    errors(v_theta[k], v_old[k], x_t[k], x0[k], t, t_beta, d, positive, negative);
    const T magnitude = std::abs(d);
    pa[l] += std::abs(positive);
    na[l] += std::abs(negative);
    ps[l] += positive * positive;
    ns[l] += negative * negative;
    da[l] += magnitude;
    dm[l] = dm[l] > magnitude ? dm[l] : magnitude;
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) one(k + l, l);
  }
  for (int l = 0; k < count; ++k, ++l) one(k, l);
  Sums sums;
  sums.positive_abs = total(pa);
  sums.negative_abs = total(na);
  sums.positive_sq = total(ps);
  sums.negative_sq = total(ns);
  sums.d_abs = total(da);
  for (int l = 0; l < kLanes; ++l) sums.d_max = std::max(sums.d_max, static_cast<double>(dm[l]));
  if (std::isnan(sums.d_abs)) sums.d_max = sums.d_abs;
  if (a.has_ref) {
    const T* v_ref = load(a.v_ref, b, start, count, buf.v_ref);
    T kl[kLanes] = {0};
    for (k = 0; k + kLanes <= count; k += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const T delta = v_theta[k + l] - v_ref[k + l];
        kl[l] += delta * delta;
      }
    }
    for (int l = 0; k < count; ++k, ++l) kl[l] += (v_theta[k] - v_ref[k]) * (v_theta[k] - v_ref[k]);
    sums.kl = total(kl);
  }
  return sums;
}

struct Coefficients {
  double positive, negative, kl;
};

double time_weighting(int weighting, double t) {
  return weighting == kTime ? t : weighting == kTimeSquared ? t * t : 1.0;
}

// Per-sample results into details, and the factors of e+, e- and (v_theta - v_ref) in the gradient.
template <typename T>
Coefficients finish(const LossArgs& a, int64_t b, const Sums& s) {
  const double n = static_cast<double>(a.elements), r = value(a.r, b), beta = value(a.beta, b), t = value(a.t, b);
  auto weight = [&](double abs_sum) {
    const double mean = abs_sum / n;
    return a.weighting == kAdaptive ? (mean < 1e-5 ? 1e-5 : mean) : 1.0;
  };
  const double w_positive = weight(s.positive_abs), w_negative = weight(s.negative_abs);
  const double scale = time_weighting(a.weighting, t);
  const double l_positive = scale * s.positive_sq / n / w_positive;
  const double l_negative = scale * s.negative_sq / n / w_negative;
  const double values[8] = {a.adv_clip_max * (r * l_positive + (1 - r) * l_negative) / beta,
                            l_positive, l_negative, w_positive, w_negative, s.kl / n, s.d_abs / n, s.d_max};
  for (int i = 0; i < 8; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(values[i]);
  const double outer = a.grad_scale / n / static_cast<double>(a.batch);
  const double common = 2 * a.adv_clip_max * scale * t * outer;
  return {-common * r / w_positive, common * (1 - r) / w_negative,
          2 * a.kl_weight * outer};
}

template <typename T>
void chunk_grad(const LossArgs& a, int64_t b, int64_t start, int64_t count, const Coefficients& c, Buffers<T>& buf) {
  const T* v_theta = load(a.v_theta, b, start, count, buf.v_theta);
  const T* v_old = load(a.v_old, b, start, count, buf.v_old);
  const T* x_t = load(a.x_t, b, start, count, buf.x_t);
  const T* x0 = load(a.x0, b, start, count, buf.x0);
  const T t = static_cast<T>(value(a.t, b)), t_beta = static_cast<T>(value(a.t, b) * value(a.beta, b));
  const T positive_factor = static_cast<T>(c.positive), negative_factor = static_cast<T>(c.negative);
  const bool direct = dense(a.grad) && a.grad.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64);
  T* grad = direct ? reinterpret_cast<T*>(sample_start(a.grad, b)) + start : buf.grad;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    T d, positive, negative;
    errors(v_theta[k], v_old[k], x_t[k], x0[k], t, t_beta, d, positive, negative);
    grad[k] = positive_factor * positive + negative_factor * negative;
  }
  if (a.has_ref && a.kl_weight > 0) {
    const T* v_ref = load(a.v_ref, b, start, count, buf.v_ref);
    const T factor = static_cast<T>(c.kl);
    for (int64_t k = 0; k < count; ++k) grad[k] += factor * (v_theta[k] - v_ref[k]);
  }
  if (!direct) store(a.grad, b, start, count, grad);
}

template <typename T>
void reduce(const LossArgs& a) {
  const T *policy = static_cast<const T*>(a.details), *kl = policy + 5 * a.batch;
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b) sum += static_cast<double>(policy[b]) + a.kl_weight * static_cast<double>(kl[b]);
  *static_cast<T*>(a.loss) = static_cast<T>(sum / static_cast<double>(a.batch));
}

// All threads share one sample, so that it is still in cache when its gradient is written in the same visit.
template <typename T>
void loss(const LossArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
  auto length = [&](int64_t c) { return std::min(kChunk, a.elements - c * kChunk); };
  if (chunks == 1) {
#pragma omp parallel
    {
      Buffers<T> buf;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.batch; ++b) {
        const Coefficients c = finish<T>(a, b, chunk_sums<T>(a, b, 0, a.elements, buf));
        if (a.want_grad) chunk_grad<T>(a, b, 0, a.elements, c, buf);
      }
    }
    return reduce<T>(a);
  }
  // Two sets, so that a thread may start the next sample while another still adds up this one.
  std::vector<Sums> partial(2 * chunks);
#pragma omp parallel
  {
    Buffers<T> buf;
    for (int64_t b = 0; b < a.batch; ++b) {
      Sums* mine = partial.data() + (b & 1) * chunks;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks; ++c) mine[c] = chunk_sums<T>(a, b, c * kChunk, length(c), buf);
      Coefficients coefficients{};
#pragma omp single copyprivate(coefficients)
      {
        Sums sums;
        for (int64_t c = 0; c < chunks; ++c) sums.add(mine[c]);
        coefficients = finish<T>(a, b, sums);
      }
      if (a.want_grad) {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < chunks; ++c)
          chunk_grad<T>(a, b, c * kChunk, length(c), coefficients, buf);
      }
    }
  }
  reduce<T>(a);
}

template <typename T>
void noise(const NoiseArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
#pragma omp parallel
  {
    Buffers<T> buf;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * chunks; ++item) {
      const int64_t b = item / chunks, start = item % chunks * kChunk, count = std::min(kChunk, a.elements - start);
      const T* x0 = load(a.x0, b, start, count, buf.x0);
      const T* eps = buf.v_ref;
      if (a.has_noise) {
        eps = load(a.noise, b, start, count, buf.v_ref);
      } else {
        for (int64_t k = 0; k < count; k += 4) {
          float four[4];
          normals(static_cast<uint64_t>(a.seed[b]), static_cast<uint64_t>(a.sample[b]),
                  static_cast<uint64_t>((start + k) / 4), four);
          for (int64_t j = 0; j < std::min<int64_t>(4, count - k); ++j) buf.v_ref[k + j] = static_cast<T>(four[j]);
        }
      }
      const T t = static_cast<T>(value(a.t, b)), keep = static_cast<T>(1 - value(a.t, b));
      for (int64_t k = 0; k < count; ++k) buf.grad[k] = keep * x0[k] + t * eps[k];
      store(a.out, b, start, count, buf.grad);
    }
  }
}

}  // namespace

void nft_loss(const LossArgs& args) { args.double_math ? loss<double>(args) : loss<float>(args); }

void add_noise(const NoiseArgs& args) { args.double_math ? noise<double>(args) : noise<float>(args); }

}  // namespace NFT_ISA
}  // namespace nft

// Access to tensors in chunks, whatever their dtype and strides; included by every kernel source (NFT_ISA names the
// namespace).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "../math.h"

namespace nft {
namespace NFT_ISA {

// One chunk of all inputs fits the first-level cache, and partial sums per chunk make the result independent of
// the number of threads.
constexpr int64_t kChunk = 2048;
constexpr int kLanes = 16;
// Elements below which waking other threads takes longer than the work.
constexpr int64_t kParallel = 1 << 14;

template <typename F>
inline void each(int64_t count, F body) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) body(k);
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

inline double value(const Vector& x, int64_t b) {
  return x.data ? load_one<double>(x.data, x.dtype, b * x.stride) : x.constant;
}

template <typename T>
inline void store_one(void* data, int dtype, int64_t i, T value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case kBFloat16: static_cast<uint16_t*>(data)[i] = to_bf16(static_cast<float>(value)); break;
    case kFloat16: static_cast<uint16_t*>(data)[i] = to_fp16(static_cast<float>(value)); break;
    default: static_cast<double*>(data)[i] = static_cast<double>(value);
  }
}

// Calls body(offset, k, n) for elements [start, start + count) of one sample, in logical order and in runs: n of them
// from number k on, which lie from ``offset`` on with the stride of the last dimension.
template <typename F>
inline void walk(const View& view, int64_t start, int64_t count, F body) {
  int64_t index[kMaxDims] = {0}, rest = start, offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    index[d] = rest % view.size[d];
    rest /= view.size[d];
    offset += index[d] * view.stride[d];
  }
  const int last = view.dims - 1;
  for (int64_t k = 0, n; k < count; k += n) {
    n = std::min(count - k, view.size[last] - index[last]);
    body(offset, k, n);
    offset += n * view.stride[last];
    index[last] += n;
    for (int d = last; d > 0 && index[d] == view.size[d]; --d) {
      offset += view.stride[d - 1] - view.size[d] * view.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Dense values in the compute type: the memory itself when it already is that, else a converted copy.
template <typename T>
const T* load_dense(const void* data, int dtype, int64_t count, T* buffer) {
  if (dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) return static_cast<const T*>(data);
  const uint16_t* narrow = static_cast<const uint16_t*>(data);
  if (dtype == kBFloat16) {
    for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(from_bf16(narrow[k]));
    return buffer;
  }
  int64_t k = 0;
#if defined(__F16C__)
  if (dtype == kFloat16 && sizeof(T) == 4) {
    for (; k + 8 <= count; k += 8)
      _mm256_storeu_ps(reinterpret_cast<float*>(buffer) + k,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + k))));
  }
#endif
  for (; k < count; ++k) buffer[k] = load_one<T>(data, dtype, k);
  return buffer;
}

template <typename T>
void store_dense(void* data, int dtype, int64_t count, const T* values) {
  uint16_t* narrow = static_cast<uint16_t*>(data);
  if (dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) {
    std::memcpy(data, values, count * sizeof(T));
    return;
  }
  if (dtype == kBFloat16) {
    for (int64_t k = 0; k < count; ++k) narrow[k] = to_bf16(static_cast<float>(values[k]));
    return;
  }
  int64_t k = 0;
#if defined(__F16C__)
  if (dtype == kFloat16 && sizeof(T) == 4) {
    for (; k + 8 <= count; k += 8)
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(narrow + k),
          _mm256_cvtps_ph(_mm256_loadu_ps(reinterpret_cast<const float*>(values) + k), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; k < count; ++k) store_one<T>(data, dtype, k, values[k]);
}

// Values with gaps between them, or one for all where the stride is 0.
template <typename T>
void load_strided(const void* data, int dtype, int64_t stride, int64_t count, T* out) {
  if (stride == 0) {
    std::fill_n(out, count, load_one<T>(data, dtype, 0));
    return;
  }
  // One loop a dtype: a choice inside would be made for every value.
  auto read = [&](auto convert, auto* items) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(convert(items[i * stride]));
  };
  switch (dtype) {
    case kFloat32: return read([](float x) { return x; }, static_cast<const float*>(data));
    case kBFloat16: return read([](uint16_t x) { return from_bf16(x); }, static_cast<const uint16_t*>(data));
    case kFloat16: return read([](uint16_t x) { return from_fp16(x); }, static_cast<const uint16_t*>(data));
    default: return read([](double x) { return x; }, static_cast<const double*>(data));
  }
}

// The chunk as compute-type values: the tensor's own memory when it already is that, else a converted copy.
template <typename T>
const T* load(const View& view, int64_t b, int64_t start, int64_t count, T* buffer) {
  const char* base = sample_start(view, b);
  if (dense(view)) return load_dense(base + start * item_size(view.dtype), view.dtype, count, buffer);
  const int64_t stride = view.stride[view.dims - 1];
  const T* chunk = buffer;
  walk(view, start, count, [&](int64_t o, int64_t k, int64_t n) {
    const char* data = base + o * item_size(view.dtype);
    if (stride != 1) return load_strided(data, view.dtype, stride, n, buffer + k);
    const T* run = load_dense(data, view.dtype, n, buffer + k);
    if (n == count)
      chunk = run;
    else if (run != buffer + k)
      std::copy_n(run, n, buffer + k);
  });
  return chunk;
}

// The chunk where there is a tensor, else one value for all.
template <typename T>
const T* load_or(bool there, const View& view, int64_t b, int64_t start, int64_t count, T otherwise, T* buffer) {
  if (there) return load(view, b, start, count, buffer);
  std::fill_n(buffer, count, otherwise);
  return buffer;
}

template <typename T>
void store(const View& view, int64_t b, int64_t start, int64_t count, const T* values) {
  char* base = sample_start(view, b);
  if (dense(view)) return store_dense(base + start * item_size(view.dtype), view.dtype, count, values);
  const int64_t stride = view.stride[view.dims - 1];
  walk(view, start, count, [&](int64_t o, int64_t k, int64_t n) {
    if (stride == 1) {
      store_dense(base + o * item_size(view.dtype), view.dtype, n, values + k);
    } else {
      for (int64_t i = 0; i < n; ++i) store_one<T>(base, view.dtype, o + i * stride, values[k + i]);
    }
  });
}

// Asks for large pages for an output of many megabytes. Memory fresh from the system is faulted in page by page as it is
// written, which with pages of 4 KiB takes longer than all the arithmetic.
inline void expect_writes(const View& view, int64_t batch, int64_t elements) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (!dense(view) || view.batch_stride != elements) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(view.data);
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + static_cast<uintptr_t>(batch * elements) * item_size(view.dtype)) / kPage * kPage;
  if (end >= begin + 4 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Whether a dense output is too large to stay in a cache until it is read. Then it is written past the caches, which
// would first read from memory what is overwritten.
inline bool passes_caches(const View& view, int64_t batch, int64_t elements) {
#if defined(__AVX__)
  return dense(view) && batch * elements * item_size(view.dtype) >= int64_t(16) << 20;
#else
  return false;
#endif
}

// Copies kBytes past the caches to an address that is a multiple of 32; ``finish_passing`` must follow.
template <size_t kBytes>
inline void pass_caches(void* target, const void* source) {
#if defined(__AVX__)
  for (size_t i = 0; i < kBytes / sizeof(__m256i); ++i)
    _mm256_stream_si256(static_cast<__m256i*>(target) + i, _mm256_load_si256(static_cast<const __m256i*>(source) + i));
#endif
}

inline void finish_passing() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Where the chunk's values may be computed: the tensor's own memory when `store` would only copy them there.
template <typename T>
T* place(const View& view, int64_t b, int64_t start, T* buffer) {
  const bool same = view.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64);
  return dense(view) && same ? reinterpret_cast<T*>(sample_start(view, b)) + start : buffer;
}

// How a value is kept in memory: as it is computed with, or as the bits of a bfloat16.
inline float get(float value) { return value; }
inline double get(double value) { return value; }
inline float get(uint16_t bits) { return from_bf16(bits); }
inline void set(float& target, float value) { target = value; }
inline void set(double& target, double value) { target = value; }
inline void set(uint16_t& target, float value) { target = to_bf16(value); }

// Lane l of kLanes takes two elements at a time. Those of bfloat16 are neighbours, which a shift and a mask of 32 bits
// tell apart, where lanes of 16 bits would have to be shuffled.
template <typename S>
constexpr int place_of(int l, int i) {
  return std::is_same_v<S, uint16_t> ? 2 * l + i : l + i * kLanes;
}

template <typename T>
inline T part(const T* data, int l, int i) {
  return data[place_of<T>(l, i)];
}
inline float part(const uint16_t* data, int l, int i) {
  uint32_t bits;
  std::memcpy(&bits, data + 2 * l, 4);
  bits = i ? bits & 0xffff0000u : bits << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
inline void set_parts(T* data, int l, T first, T second) {
  data[place_of<T>(l, 0)] = first;
  data[place_of<T>(l, 1)] = second;
}
inline void set_parts(uint16_t* data, int l, float first, float second) {
  const uint32_t bits = round_to_bf16(first) >> 16 | (round_to_bf16(second) & 0xffff0000u);
  std::memcpy(data + 2 * l, &bits, 4);
}

inline bool plain_bf16(const View& view) { return dense(view) && view.dtype == kBFloat16; }

// The chunk as S: with T's own type that of any tensor, converted into the buffer where it must be; with another that
// of a dense tensor of it. Memory answers several streams in one loop faster than one after the other.
template <typename T, typename S>
const S* source(const View& view, int64_t b, int64_t start, int64_t count, T* buffer) {
  if constexpr (std::is_same_v<S, T>)
    return load(view, b, start, count, buffer);
  else
    return reinterpret_cast<const S*>(sample_start(view, b)) + start;
}

// Where the chunk's values may be written: a place, or with another type than T the tensor's own memory.
template <typename T, typename S>
S* target(const View& view, int64_t b, int64_t start, T* buffer) {
  if constexpr (std::is_same_v<S, T>)
    return place(view, b, start, buffer);
  else
    return reinterpret_cast<S*>(sample_start(view, b)) + start;
}

template <typename T>
double total(const T* lanes) {
  // Four at a time: one after another would take longer than a short sample's elements.
  double sums[4] = {0};
  for (int l = 0; l < kLanes; l += 4)
    for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(lanes[l + i]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Standard normals for elements [start, start + count) of one sample; start is a multiple of 4.
template <typename T>
void draw(int64_t seed, int64_t sample, int64_t start, int64_t count, T* out) {
  float values[4 * kLanes];
  for (int64_t k = 0; k < count; k += 4 * kLanes) {
    // A variable of the loop itself would become an array in memory.
    auto lane = [&](int l) __attribute__((always_inline)) {
      float four[4];
      normals(static_cast<uint64_t>(seed), static_cast<uint64_t>(sample), static_cast<uint64_t>((start + k) / 4 + l), four);
      values[4 * l] = four[0], values[4 * l + 1] = four[1], values[4 * l + 2] = four[2], values[4 * l + 3] = four[3];
    };
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane(l);
    std::copy_n(values, std::min<int64_t>(4 * kLanes, count - k), out + k);
  }
}

}  // namespace NFT_ISA
}  // namespace nft

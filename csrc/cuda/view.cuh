// Access to tensors from kernels, in packs, whatever their dtype and strides.
#pragma once
#include <cuda_fp16.h>

#include "../math.h"
#include "slices.h"

namespace nft {
namespace cuda {

template <typename T>
struct Pack {
  T v[kPack<T>];
};

// The items of a pack as they lie in memory. Kept apart from their conversion, so that a thread can have the loads of
// several tensors in flight before it waits for the first.
struct Bits {
  uint32_t v[8];
};

__device__ inline uint4 word(const Bits& bits, int i) {
  return make_uint4(bits.v[4 * i], bits.v[4 * i + 1], bits.v[4 * i + 2], bits.v[4 * i + 3]);
}

__device__ inline void set_word(Bits& bits, int i, uint4 word) {
  bits.v[4 * i] = word.x;
  bits.v[4 * i + 1] = word.y;
  bits.v[4 * i + 2] = word.z;
  bits.v[4 * i + 3] = word.w;
}

// A row of a tensor, a pack's first element in it, and where the sample that it belongs to ends.
struct Place {
  int64_t row, first, end;
};

template <typename T>
NFT_HD Place place_of(const Part& part, int64_t pack) {
  return {part.row, part.start + pack * kPack<T>, part.start + part.length};
}

// Where item j of the pack at `run` lies.
__device__ inline int64_t item_offset(const View& view, const Run& run, int64_t first, int j) {
  if (j >= run.length) return run_at(view, first + j).offset;
  return run.offset + (j > 0 ? j * view.stride[view.dims - 1] : 0);
}

// Items past the end of the sample read as zero. kPacked: the view is packed<T>.
template <typename T, bool kPacked>
__device__ Bits fetch(const View& view, const Place& place) {
  const int size = item_size(view.dtype);
  const char* base = sample_start(view, place.row);
  Bits bits{};
  if constexpr (kPacked) {
    const uint4* words = reinterpret_cast<const uint4*>(base + place.first * size);
    set_word(bits, 0, words[0]);
    if (size == 4) set_word(bits, 1, words[1]);
  } else {
    const Run run = run_at(view, place.first);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      if (place.first + j >= place.end) break;
      const char* item = base + item_offset(view, run, place.first, j) * size;
      if (size == 2) {
        bits.v[j / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(item)) << (16 * (j % 2));
      } else if (size == 4) {
        bits.v[j] = *reinterpret_cast<const uint32_t*>(item);
      } else if constexpr (sizeof(T) == 8) {
        const uint2 both = *reinterpret_cast<const uint2*>(item);
        bits.v[2 * j] = both.x;
        bits.v[2 * j + 1] = both.y;
      }
    }
  }
  return bits;
}

template <typename T>
__device__ Pack<T> unpack(const Bits& bits, int dtype) {
  Pack<T> out;
  auto half = [&](int j) { return static_cast<uint16_t>(bits.v[j / 2] >> (16 * (j % 2))); };
  switch (dtype) {
    case kFloat32:
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out.v[j] = static_cast<T>(__uint_as_float(bits.v[j]));
      break;
    case kBFloat16:
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out.v[j] = static_cast<T>(from_bf16(half(j)));
      break;
    case kFloat16:
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out.v[j] = static_cast<T>(__half2float(__ushort_as_half(half(j))));
      break;
    default:
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j)
        if constexpr (sizeof(T) == 8) out.v[j] = __hiloint2double(bits.v[2 * j + 1], bits.v[2 * j]);
  }
  return out;
}

template <typename T, bool kPacked>
__device__ Pack<T> load(const View& view, const Place& place) {
  return unpack<T>(fetch<T, kPacked>(view, place), view.dtype);
}

template <typename T>
__device__ uint16_t half_bits(T value, int dtype) {
  const float narrow = static_cast<float>(value);
  return dtype == kBFloat16 ? to_bf16(narrow) : __half_as_ushort(__float2half_rn(narrow));
}

// Writes nothing past the end of the sample.
template <typename T, bool kPacked>
__device__ void store(const View& view, const Place& place, const Pack<T>& values) {
  const int size = item_size(view.dtype);
  char* base = sample_start(view, place.row);
  if constexpr (kPacked) {
    uint4* words = reinterpret_cast<uint4*>(base + place.first * size);
    Bits bits{};
    if (size == 4) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) bits.v[j] = __float_as_uint(values.v[j]);
      words[1] = word(bits, 1);
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j)
        bits.v[j / 2] |= static_cast<uint32_t>(half_bits(values.v[j], view.dtype)) << (16 * (j % 2));
    }
    words[0] = word(bits, 0);
  } else {
    const Run run = run_at(view, place.first);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      if (place.first + j >= place.end) break;
      char* item = base + item_offset(view, run, place.first, j) * size;
      switch (view.dtype) {
        case kFloat32: *reinterpret_cast<float*>(item) = static_cast<float>(values.v[j]); break;
        case kFloat64: *reinterpret_cast<double*>(item) = static_cast<double>(values.v[j]); break;
        default: *reinterpret_cast<uint16_t*>(item) = half_bits(values.v[j], view.dtype);
      }
    }
  }
}

// Has the second-level cache fetch whole 16-byte words, and does not wait for them.
__device__ inline void prefetch(const char* data, int64_t bytes) {
#if defined(__NVCC__) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(data)), "r"(static_cast<unsigned>(bytes)));
#endif
}

// Standard normals for a pack of one sample.
template <typename T>
__device__ Pack<T> draw(int64_t seed, int64_t sample, int64_t pack) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < kPack<T> / 4; ++i) {
    float four[4];
    normals(static_cast<uint64_t>(seed), static_cast<uint64_t>(sample),
            static_cast<uint64_t>(pack) * (kPack<T> / 4) + i, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) out.v[4 * i + j] = static_cast<T>(four[j]);
  }
  return out;
}

__device__ inline double value(const Vector& x, int64_t b) {
  if (!x.data) return x.constant;
  const char* item = static_cast<const char*>(x.data) + b * x.stride * item_size(x.dtype);
  switch (x.dtype) {
    case kFloat32: return *reinterpret_cast<const float*>(item);
    case kBFloat16: return from_bf16(*reinterpret_cast<const uint16_t*>(item));
    case kFloat16: return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t*>(item)));
    default: return *reinterpret_cast<const double*>(item);
  }
}

}  // namespace cuda
}  // namespace nft

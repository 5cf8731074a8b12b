// Sums over warps and blocks, in an order that is always the same.
#pragma once
#include <cstring>

#include "../math.h"
#include "slices.h"

namespace nft {
namespace cuda {

constexpr int kWarps = kThreads / 32;

template <typename T>
struct Sum {
  T value;

  template <typename U>
  NFT_HD void add(const Sum<U>& o) {
    value += o.value;
  }
};

// The partner lane's value; S<T> is a struct of T alone.
template <template <typename> class S, typename T>
__device__ S<T> exchange(const S<T>& mine, int lane_mask) {
  constexpr int kFields = sizeof(S<T>) / sizeof(T);
  T fields[kFields];
  memcpy(fields, &mine, sizeof mine);
#pragma unroll
  for (int i = 0; i < kFields; ++i) fields[i] = __shfl_xor_sync(0xffffffffu, fields[i], lane_mask);
  S<T> other;
  memcpy(&other, fields, sizeof other);
  return other;
}

// In every lane; all lanes must call it.
template <template <typename> class S, typename T>
__device__ S<T> warp_total(S<T> s) {
#pragma unroll
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) s.add(exchange(s, lane_mask));
  return s;
}

// In the first warp; all threads must call it. Within warps in the compute type, as double is slow on many GPUs.
template <template <typename> class S, typename T>
__device__ S<double> block_total(const S<T>& mine, S<T> (&warps)[kWarps]) {
  const S<T> of_warp = warp_total(mine);
  __syncthreads();  // the first warp may still be reading the last total
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  S<double> total{};
  if (threadIdx.x >= 32) return total;
  if (threadIdx.x < blockDim.x / 32) total.add(warps[threadIdx.x]);
  return warp_total(total);
}

}  // namespace cuda
}  // namespace nft

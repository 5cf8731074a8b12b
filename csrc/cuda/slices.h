// How a launch cuts a batch into blocks. Plain arithmetic, so that tests reach it without a GPU.
#pragma once
#include "../args.h"

#ifdef __CUDACC__
#define NFT_CALLED inline __host__ __device__ __noinline__
#else
#define NFT_CALLED inline
#endif

namespace nft {
namespace cuda {

// Elements a thread handles at a time: 32 bytes of the compute type, and at most two 16-byte words of a tensor.
template <typename T>
constexpr int kPack = 32 / sizeof(T);

template <typename T>
NFT_HD int64_t packs_of(int64_t elements) {
  return (elements + kPack<T> - 1) / kPack<T>;
}

constexpr int kThreads = 256;
// Enough to fill any GPU when the batch is small. A constant, so that sums do not depend on the GPU's size.
constexpr int64_t kBlocks = 512;

// Every sample is cut into `splits` slices of `length` packs, the last one perhaps shorter, none empty.
struct Slices {
  int64_t packs, splits, length;

  NFT_HD int64_t first(int64_t split) const { return split * length; }
  NFT_HD int64_t last(int64_t split) const {
    const int64_t end = (split + 1) * length;
    return end < packs ? end : packs;
  }
};

// Of one sample, so that the batch has kBlocks slices or a few more.
NFT_HD int64_t most_splits(int64_t batch) { return (kBlocks + batch - 1) / batch; }

// That many slices, unless the threads of a block would lack packs. At most batch + kBlocks of them.
NFT_HD Slices slices_of(int64_t batch, int64_t packs) {
  const int64_t wanted = most_splits(batch), useful = (packs + kThreads - 1) / kThreads;
  // A segment may be empty where nobody could look at its offsets.
  if (useful < 1) return {0, 1, 0};
  const int64_t most = wanted < useful ? wanted : useful, length = (packs + most - 1) / most;
  return {packs, (packs + length - 1) / length, length};
}

// Whole warps, and no more of them than the slice can use.
NFT_HD int threads_for(int64_t length) {
  return length >= kThreads ? kThreads : static_cast<int>((length + 31) / 32 * 32);
}

// Whether packs of the view can be moved as aligned 16-byte words. Doubles are for checks and never need it.
template <typename T>
NFT_HD bool packed(const View& view, int64_t batch, int64_t elements) {
  const int64_t sample_bytes = view.batch_stride * item_size(view.dtype);
  return sizeof(T) == 4 && item_size(view.dtype) <= 4 && dense(view) && elements % kPack<T> == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (batch == 1 || sample_bytes % 16 == 0);
}

// Where an element lies, in elements from its sample's start, and for how many elements from it on (itself included)
// each lies one stride of the innermost dimension further.
struct Run {
  int64_t offset, length;
};

// Not inlined: a pack asks for it once per tensor, or once per element in small dimensions, and the divisions are long.
NFT_CALLED Run run_at(const View& view, int64_t k) {
  uint64_t rest = static_cast<uint64_t>(k);
  Run run{0, 1};
  for (int d = view.dims - 1; d >= 0; --d) {
    const uint64_t size = static_cast<uint64_t>(view.size[d]), above = d > 0 ? rest / size : 0;
    const int64_t index = static_cast<int64_t>(rest - above * size);
    run.offset += index * view.stride[d];
    if (d == view.dims - 1) run.length = view.size[d] - index;
    rest = above;
  }
  return run;
}

}  // namespace cuda
}  // namespace nft

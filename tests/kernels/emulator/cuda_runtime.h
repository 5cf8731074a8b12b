// CUDA on the CPU, as far as the kernels in csrc/cuda use it. A block is a thread of the system, its threads are fibers
// that run in turn up to where they wait for each other, and shared memory is what is local to the system's thread.
#pragma once
// Before the macros below, whose names the standard library uses for itself.
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t lanes[32];
};

// Where the shared memory of each block begins, and how often threads of all have arrived.
struct Cluster {
  std::vector<char*> origins;
  std::atomic<uint64_t> arrivals{0};
};

inline thread_local char origin;

struct Block {
  std::function<void()> body;
  Cluster* cluster;
  unsigned rank;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<Warp> warps;
  std::vector<uint64_t> arrivals;
  std::vector<char> done;
  Barrier barrier;
  bool waits_for_others;
};

inline thread_local Block* block;

inline void yield() { swapcontext(&block->fibers[threadIdx.x], &block->scheduler); }

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  block->body();
  block->done[threadIdx.x] = 1;
  yield();
}

inline void run(Block& mine, unsigned threads) {
  constexpr size_t kStack = 1 << 17;
  // Not cleared, so that only what is used is ever touched.
  const std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  block = &mine;
  mine.fibers.resize(threads);
  mine.warps.resize((threads + 31) / 32);
  mine.arrivals.resize(threads);
  mine.done.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&mine.fibers[i]);
    mine.fibers[i].uc_stack.ss_sp = stacks.get() + i * kStack;
    mine.fibers[i].uc_stack.ss_size = kStack;
    makecontext(&mine.fibers[i], enter, 0);
  }
  for (bool left = true; left;) {
    left = mine.waits_for_others = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (mine.done[i]) continue;
      left = true;
      threadIdx.x = i;
      swapcontext(&mine.scheduler, &mine.fibers[i]);
    }
    // Only then: beside other work it costs a whole slice of time.
    if (mine.waits_for_others) std::this_thread::yield();
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block->barrier, blockDim.x); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  emulator::Warp& warp = emulator::block->warps[threadIdx.x / 32];
  std::memcpy(warp.lanes + threadIdx.x % 32, &value, sizeof value);
  emulator::wait(warp.barrier, 32);
  std::memcpy(&value, warp.lanes + (threadIdx.x % 32 ^ lane_mask), sizeof value);
  emulator::wait(warp.barrier, 32);
  return value;
}

inline unsigned long long atomicAdd(unsigned long long* x, unsigned long long y) { return __sync_fetch_and_add(x, y); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <typename T>
T __ldcg(const T* x) {
  return *x;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline double __hiloint2double(unsigned high, unsigned low) {
  return same_bits<double>(static_cast<uint64_t>(high) << 32 | low);
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// So small a device that small samples need clusters of several blocks, larger ones all of it, and still larger ones two
// launches.
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 64 << 10 : which == cudaDevAttrMultiProcessorCount ? 3 : 1;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {512, 90};
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeCooperative
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed, cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t shared_bytes) {
  *blocks = shared_bytes > 60 << 10 ? 1 : 3;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = config->attrs[0].val.clusterDim.x > 2 ? 0 : 4;
  return cudaSuccess;
}

// What a launch may do early it does when the launch before is over.
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  // Blocks that run at once: those of a cluster, or all.
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) size = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) size = config->gridDim.x;
  }
  for (unsigned first = 0; first < config->gridDim.x; first += size) {
    emulator::Cluster cluster;
    cluster.origins.resize(size);
    std::vector<std::thread> blocks;
    for (unsigned rank = 0; rank < size; ++rank)
      blocks.emplace_back([&, rank] {
        emulator::Block block{};
        block.body = [&] { std::apply(kernel, values); };
        block.cluster = &cluster;
        block.rank = rank;
        cluster.origins[rank] = &emulator::origin;
        blockIdx = first + rank;
        gridDim = config->gridDim;
        blockDim = config->blockDim;
        emulator::run(block, config->blockDim.x);
      });
    for (std::thread& thread : blocks) thread.join();
  }
  return cudaSuccess;
}

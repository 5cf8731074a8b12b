// Launching kernels: on the tensors' device, in the caller's stream, with errors as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "slices.h"

namespace nft {
namespace cuda {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks would report this error again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : wanted_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != wanted_) check(cudaSetDevice(wanted_));
  }
  ~DeviceGuard() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int wanted_, before_ = 0;
};

struct Shape {
  int64_t blocks;
  int threads;
  int cluster = 0;  // blocks per cluster; 0 is a launch without clusters
  size_t shared_bytes = 0;
  bool early = false;     // may start before the launch before is done, which it waits for itself
  bool together = false;  // all blocks run at once, or none
};

// Kernels loop over their slices, so a grid may be smaller than the work.
inline Shape shape_of(int64_t batch, const Slices& slices) {
  return {std::min<int64_t>(batch * slices.splits, 0x7fffffff), threads_for(slices.length)};
}

// A launch configuration in CUDA's terms.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[3]{};

  Configuration(const Shape& shape, void* stream) {
    // Older devices accept neither of the first two.
    if (shape.cluster > 0) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (shape.early) {
      cudaLaunchAttribute& early = attributes[config.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.together) {
      cudaLaunchAttribute& together = attributes[config.numAttrs++];
      together.id = cudaLaunchAttributeCooperative;
      together.val.cooperative = 1;
    }
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
  }
  Configuration(const Configuration&) = delete;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Queue& queue, Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ...) <= 4000, "the parameters of a kernel fit in 4 KB everywhere");
  const Configuration configuration(shape, queue.stream);
  check(cudaLaunchKernelEx(&configuration.config, kernel, std::forward<Arguments>(arguments)...));
}

// Calls run(T{}, kPacked) for the kernel variant that these views need. A view that is not used counts as packed.
template <typename Run>
void choose_variant(bool double_math, int64_t batch, int64_t elements, const std::vector<const View*>& views,
                    Run run) {
  const bool all_packed =
      std::all_of(views.begin(), views.end(), [&](const View* v) { return packed<float>(*v, batch, elements); });
  if (double_math)
    run(double{}, std::false_type{});
  else if (all_packed)
    run(float{}, std::true_type{});
  else
    run(float{}, std::false_type{});
}

}  // namespace cuda
}  // namespace nft

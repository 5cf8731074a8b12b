// x_t = (1-t) x0 + t eps with the noise drawn in the kernel. Not yet reachable from Python.
#include "math.h"

namespace nft {

__global__ void add_noise_kernel(const float* x0, const float* t, const int64_t* seed, const int64_t* sample,
                                 float* x_t, int64_t batch, int64_t elements) {
  const int64_t blocks = (elements + 3) / 4;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < batch * blocks;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t b = i / blocks, block = i % blocks;
    float eps[4];
    normals(seed[b], sample[b], block, eps);
    for (int64_t k = 4 * block, j = 0; j < 4 && k < elements; ++j, ++k)
      x_t[b * elements + k] = (1 - t[b]) * x0[b * elements + k] + t[b] * eps[j];
  }
}

int add_noise_cuda(const float* x0, const float* t, const int64_t* seed, const int64_t* sample, float* x_t,
                   int64_t batch, int64_t elements, void* stream) {
  const int64_t wanted = (batch * ((elements + 3) / 4) + 255) / 256;
  const int grid = static_cast<int>(wanted < 4096 ? wanted : 4096);
  add_noise_kernel<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(x0, t, seed, sample, x_t, batch, elements);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace nft

// The kernels of csrc/cuda, all in one, for the emulated CUDA beside this file.
#include "../../../csrc/cuda/nft_loss.cu"

namespace nft {
namespace cuda {
namespace {
// What the kernels declare as dynamic shared memory.
thread_local uint4 words[4096];
}  // namespace
}  // namespace cuda
}  // namespace nft

#include "../../../csrc/cuda/add_noise.cu"
#include "../../../csrc/cuda/solver_step.cu"

// Interface of the CUDA kernels; no header of CUDA is needed to call them. They throw std::runtime_error.
#pragma once
#include <cstddef>
#include <string>

#include "../args.h"

namespace nft {
namespace cuda {

struct Queue {
  int device;
  void *stream, *workspace;
};

// Why the device cannot run these kernels; empty when it can.
std::string why_not(int device);

// Bytes of device memory, aligned to 8, that nft_loss, and solver_step where z_square is wanted, take as workspace.
size_t workspace_size(int64_t batch);

void nft_loss(const LossArgs&, const Queue&);
void add_noise(const NoiseArgs&, const Queue&);
void solver_step(const StepArgs&, const Queue&);

// tensor *= *factor for a dense view, where *factor is of the compute type.
struct ScaleArgs {
  View tensor;
  bool double_math;
  int64_t batch, elements;
  const void* factor;
};
void scale(const ScaleArgs&, const Queue&);

}  // namespace cuda
}  // namespace nft

// What every kernel is given, on the CPU and in CUDA: tensors as pointers, sizes and strides.
#pragma once
#include <cstdint>

// Always inlined on the host as well: the CPU kernels are compiled for several instruction sets, and the linker would
// keep one copy of an inline function for all of them.
#ifdef __CUDACC__
#define NFT_HD __host__ __device__ __forceinline__
#else
#define NFT_HD inline __attribute__((always_inline))
#endif

namespace nft {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int kMaxDims = 12;

// A (B, N) view of a tensor: sample b starts b * batch_stride elements in; within a sample, dims and strides.
struct View {
  void* data;
  int dtype;
  int64_t batch_stride;
  int dims;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

NFT_HD int item_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

NFT_HD char* sample_start(const View& view, int64_t b) {
  return static_cast<char*>(view.data) + b * view.batch_stride * item_size(view.dtype);
}

NFT_HD bool dense(const View& view) { return view.dims == 0 || (view.dims == 1 && view.stride[0] == 1); }

// A (B,) tensor, or without data the same number for every sample.
struct Vector {
  const void* data;
  int dtype;
  int64_t stride;
  double constant;
};

// In the order of WEIGHTINGS in reference/nft_loss.py.
enum Weighting : int {
  kAdaptive = 0,
  kNone = 1,
  kTime = 2,
  kTimeSquared = 3,
  kOverTime = 4,
  kOverTimeSquared = 5,
  kLeftOverTimeSquared = 6,
};

// In the order of PREDICTIONS there.
enum Prediction : int { kVelocity = 0, kX0 = 1, kEps = 2 };

constexpr int kDetails = 8;

struct LossArgs {
  View v_theta, v_old, x_t, x0, v_ref, grad;
  View mask, policy_weight, r_elements;
  bool has_ref, want_grad, double_math;
  bool has_mask, has_policy_weight, r_per_element, detach_weight, kl_in_x0;
  int weighting, prediction;
  int64_t batch, elements;
  // Sample b is [offsets[b], offsets[b + 1]) times `elements` of packed tensors, seen as one sample; null without.
  const int64_t* offsets;
  Vector t, r, beta;
  Vector loss_weight;  // what a sample counts in the loss, in float64
  double adv_clip_max, kl_weight;
  // With a weight per token, on the CPU only: a token's channels lie `inner` elements of a sample apart. Else 0 of them.
  int64_t channels, inner;
  void* loss;             // scalar of the compute type
  void* details;          // (8, batch) of the compute type: policy, l+, l-, w+, w-, kl, mean |d|, max |d|
};

struct NoiseArgs {
  View x0, noise, out, wide;
  bool has_noise, want_wide, double_math;
  int64_t batch, elements;
  Vector t;
  const int64_t *seed, *sample;
};

constexpr int kMaxHistory = 8;

// x' = a x + sum_j b[j] h_j + c z with h_0 = p x + q v, the other h_j in history.
struct StepArgs {
  View x, v, v_uncond, noise, history[kMaxHistory];
  View out, h, x0;
  bool guided, has_noise, want_h, want_x0, double_math;
  int64_t batch, elements;
  int terms;  // entries of b
  double a, b[kMaxHistory], c, p, q, t, guidance;
  const int64_t *seed, *sample;
  double* z_square;  // (batch): mean over elements of z^2, or null
};

// Dense (B, H, W, C) pictures, and (C,) weight and bias.
struct GroupNormArgs {
  View x, out;
  Vector weight, bias;
  int64_t batch, elements, channels, groups;
  double eps;
};

// Views of (B, S, H, d), with dense heads of float32; for the gradient `out` is that of the output.
struct AttentionArgs {
  View q, k, v, out;
  View grad_q, grad_k, grad_v;
  int64_t batch;
};

}  // namespace nft

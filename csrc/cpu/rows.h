// What the kernels on rows of a transformer are given, which are for the CPU alone.
#pragma once
#include "../args.h"

namespace nft {

// A (B, S, H, D), (B, S, D), (B, D) or (D,) tensor whose last dimension is dense; the strides of dimensions it lacks
// are 0. Without data there is none.
struct Rows {
  void* data;
  int dtype;
  int64_t batch_stride, row_stride, head_stride;
};

struct LayerNormArgs {
  Rows x, y, y2, y_bias, gate, gate2, scale, shift, scale2, shift2;
  Rows h, out, out2;
  int64_t batch, length, width;
  double eps;
};

struct LayerNormGradientArgs {
  Rows h, gate, gate2, scale, scale2, grad_h, grad_out, grad_out2;
  Rows grad_x, grad_y, grad_y2;
  int64_t batch, length, width;
  double eps;
};

constexpr int kMaxStreams = 3;

// Streams without a weight are copied; with gradients of the outputs, the outputs are the gradients of the inputs.
struct QkNormArgs {
  Rows input[kMaxStreams], weight[kMaxStreams], grad[kMaxStreams], output[kMaxStreams];
  int streams;
  int64_t batch, length, heads, width;
  double eps;
};

// One row of elements each; with a gradient of the output, the output is that of the input.
struct GeluArgs {
  Rows x, grad, out;
  int64_t elements;
};

}  // namespace nft

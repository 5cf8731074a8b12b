// Normalizations and activations of a transformer's rows on the CPU, compiled once per instruction set (NFT_ISA names
// the namespace). A row is computed by one thread from its own elements alone, so its bits depend on nothing else.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>

#include "exp.h"
#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

// One thread's buffers, of a row each.
template <typename T>
class Scratch {
 public:
  Scratch(int buffers, int64_t width)
      : stride_((width + kLanes - 1) / kLanes * kLanes), data_(new T[buffers * stride_]) {}
  T* operator[](int i) { return data_.get() + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<T[]> data_;
};

template <typename... Tensors>
bool any_double(const Tensors&... tensors) {
  return ((tensors.data && tensors.dtype == kFloat64) || ...);
}

template <typename... Tensors>
bool all_bf16(const Tensors&... tensors) {
  return ((!tensors.data || tensors.dtype == kBFloat16) && ...);
}

char* start_of(const Rows& rows, int64_t b, int64_t s, int64_t head = 0) {
  const int64_t offset = b * rows.batch_stride + s * rows.row_stride + head * rows.head_stride;
  return static_cast<char*>(rows.data) + offset * item_size(rows.dtype);
}

// A row kept as S, null where there is no tensor: with T's own type that of any tensor, converted into the buffer where
// it must be; with another that of a tensor of it.
template <typename T, typename S>
const S* load(const Rows& rows, int64_t b, int64_t s, int64_t width, T* buffer) {
  if (!rows.data) return nullptr;
  if constexpr (std::is_same_v<S, T>)
    return load_dense(start_of(rows, b, s), rows.dtype, width, buffer);
  else
    return reinterpret_cast<const S*>(start_of(rows, b, s));
}

// Where a row may be computed: in the tensor's own memory when `store` would only copy it there.
template <typename T, typename S>
S* place(const Rows& rows, int64_t b, int64_t s, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    const bool same = rows.data && rows.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64);
    return same ? reinterpret_cast<T*>(start_of(rows, b, s)) : buffer;
  } else {
    return reinterpret_cast<S*>(start_of(rows, b, s));
  }
}

template <typename T>
void store(const Rows& rows, int64_t b, int64_t s, int64_t width, const T* values) {
  void* target = start_of(rows, b, s);
  if (target != values) store_dense(target, rows.dtype, width, values);
}
void store(const Rows&, int64_t, int64_t, int64_t, const uint16_t*) {}  // was placed there

const float* as_computed(const float* row, int64_t, float*) { return row; }
const double* as_computed(const double* row, int64_t, double*) { return row; }
const float* as_computed(const uint16_t* row, int64_t width, float* buffer) {
  return load_dense(row, kBFloat16, width, buffer);
}

template <typename T>
T tree(T (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Two sums over elements: body(k, first, second) adds those of element k.
template <typename T, typename F>
std::pair<T, T> sums(int64_t count, F body) {
  T first[kLanes] = {0}, second[kLanes] = {0};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) body(k + l, first[l], second[l]);
  for (int l = 0; l < count % kLanes; ++l) body(k + l, first[l], second[l]);
  return {tree(first), tree(second)};
}

// Of a row that is normalized to (x - mean) inverse + rest.
template <typename T>
struct Normalization {
  T mean, inverse, rest;
  T operator()(T x) const { return fused(x - mean, inverse, rest); }
};

template <typename T>
Normalization<T> normalization(const T* x, int64_t width, double eps) {
  const double share = 1.0 / static_cast<double>(width);
  const T mean = static_cast<T>(sums<T>(width, [&](int64_t k, T& sum, T&) { sum += x[k]; }).first * share);
  // What rounding left of the mean is found on the way, where a large mean has cancelled.
  const auto [left, squares] = sums<T>(width, [&](int64_t k, T& sum, T& square) {
    const T centred = x[k] - mean;
    sum += centred;
    square = fused(centred, centred, square);
  });
  // Rounding may leave less than nothing where all elements are the same; a NaN stays one.
  const double shift = left * share, variance = std::max(squares * share - shift * shift, 0.0);
  const double inverse = 1 / std::sqrt(variance + eps);
  return {mean, static_cast<T>(inverse), static_cast<T>(-shift * inverse)};
}

template <typename T, typename S>
void forward(const LayerNormArgs& a) {
  const int64_t rows = a.batch * a.length, width = a.width;
#pragma omp parallel if (rows * width >= kParallel)
  {
    Scratch<T> scratch(11, width);
    const S *gate = nullptr, *gate2 = nullptr, *scale = nullptr, *shift = nullptr, *scale2 = nullptr, *shift2 = nullptr;
    const S* y_bias = load<T, S>(a.y_bias, 0, 0, width, scratch[6]);
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = i / a.length, s = i % a.length;
      if (b != sample) {
        gate = load<T, S>(a.gate, b, 0, width, scratch[0]);
        gate2 = load<T, S>(a.gate2, b, 0, width, scratch[1]);
        scale = load<T, S>(a.scale, b, 0, width, scratch[2]);
        shift = load<T, S>(a.shift, b, 0, width, scratch[3]);
        scale2 = load<T, S>(a.scale2, b, 0, width, scratch[4]);
        shift2 = load<T, S>(a.shift2, b, 0, width, scratch[5]);
        sample = b;
      }
      const S* x = load<T, S>(a.x, b, s, width, scratch[7]);
      T* h = scratch[8];
      if (a.y.data) {
        const S* y = load<T, S>(a.y, b, s, width, scratch[9]);
        if constexpr (std::is_same_v<S, T>) h = place<T, T>(a.h, b, s, h);
        if (y_bias)
          each(width, [&](int64_t k) { h[k] = fused(get(gate[k]), get(y[k]) + get(y_bias[k]), get(x[k])); });
        else
          each(width, [&](int64_t k) { h[k] = fused(get(gate[k]), get(y[k]), get(x[k])); });
        if (a.y2.data) {
          const S* y2 = load<T, S>(a.y2, b, s, width, scratch[10]);
          each(width, [&](int64_t k) { h[k] = fused(get(gate2[k]), get(y2[k]), h[k]); });
        }
        store(a.h, b, s, width, h);
        // What is normalized is what the backward will find in memory.
        x = load<T, S>(a.h, b, s, width, h);
      }
      const T* row = as_computed(x, width, h);
      const Normalization<T> normed = normalization(row, width, a.eps);
      auto modulate = [&](const Rows& to, const S* scale, const S* shift) {
        S* out = place<T, S>(to, b, s, scratch[9]);
        each(width, [&](int64_t k) { set(out[k], fused(1 + get(scale[k]), normed(row[k]), get(shift[k]))); });
        store(to, b, s, width, out);
      };
      modulate(a.out, scale, shift);
      if (a.out2.data) modulate(a.out2, scale2, shift2);
    }
  }
}

template <typename T, typename S>
void backward(const LayerNormGradientArgs& a) {
  const int64_t rows = a.batch * a.length, width = a.width;
#pragma omp parallel if (rows * width >= kParallel)
  {
    Scratch<T> scratch(11, width);
    const S *gate = nullptr, *gate2 = nullptr, *scale = nullptr, *scale2 = nullptr;
    int64_t sample = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = i / a.length, s = i % a.length;
      if (b != sample) {
        gate = load<T, S>(a.gate, b, 0, width, scratch[0]);
        gate2 = load<T, S>(a.gate2, b, 0, width, scratch[1]);
        scale = load<T, S>(a.scale, b, 0, width, scratch[2]);
        scale2 = load<T, S>(a.scale2, b, 0, width, scratch[3]);
        sample = b;
      }
      const T* h = as_computed(load<T, S>(a.h, b, s, width, scratch[4]), width, scratch[4]);
      const S* grad_h = load<T, S>(a.grad_h, b, s, width, scratch[5]);
      const S* grad_out = load<T, S>(a.grad_out, b, s, width, scratch[6]);
      const S* grad_out2 = load<T, S>(a.grad_out2, b, s, width, scratch[7]);
      const Normalization<T> normed = normalization(h, width, a.eps);
      // Of the normalized row, and its sums alone and with that row.
      T* grad = scratch[8];
      auto collect = [&](auto gradient) {
        return sums<T>(width, [&](int64_t k, T& sum, T& with_normed) {
          grad[k] = gradient(k);
          sum += grad[k];
          with_normed = fused(grad[k], normed(h[k]), with_normed);
        });
      };
      auto first = [&](int64_t k) { return (1 + get(scale[k])) * get(grad_out[k]); };
      auto second = [&](int64_t k) { return (1 + get(scale2[k])) * get(grad_out2[k]); };
      const auto [sum, with_normed] = grad_out && grad_out2 ? collect([&](int64_t k) { return first(k) + second(k); })
                                      : grad_out            ? collect(first)
                                      : grad_out2           ? collect(second)
                                                            : collect([](int64_t) { return T(0); });
      const T mean = sum / static_cast<T>(width), slope = with_normed / static_cast<T>(width);
      S* grad_x = place<T, S>(a.grad_x, b, s, scratch[9]);
      T* opened = grad;
      if constexpr (std::is_same_v<S, T>) opened = grad_x;
      auto through = [&](int64_t k) { return fused(-slope, normed(h[k]), grad[k] - mean); };
      auto add = [&](auto direct) {
        each(width, [&](int64_t k) {
          opened[k] = fused(normed.inverse, through(k), direct(k));
          if constexpr (!std::is_same_v<S, T>) set(grad_x[k], opened[k]);
        });
      };
      grad_h ? add([&](int64_t k) { return get(grad_h[k]); }) : add([](int64_t) { return T(0); });
      store(a.grad_x, b, s, width, grad_x);
      auto open = [&](const Rows& to, const S* gate) {
        S* out = place<T, S>(to, b, s, scratch[10]);
        each(width, [&](int64_t k) { set(out[k], get(gate[k]) * opened[k]); });
        store(to, b, s, width, out);
      };
      if (a.grad_y.data) open(a.grad_y, gate);
      if (a.grad_y2.data) open(a.grad_y2, gate2);
    }
  }
}

// The heads of a row, `stride` apart.
template <typename S>
struct Heads {
  S* data;
  int64_t stride;
  S* operator[](int64_t head) const { return data + head * stride; }
};

template <typename T, typename S>
Heads<S> place_heads(const Rows& rows, int64_t b, int64_t s, int64_t width, T* buffer) {
  S* data = place<T, S>(rows, b, s, buffer);
  return {data, static_cast<void*>(data) == buffer ? width : rows.head_stride};
}

template <typename T, typename S>
Heads<const S> load_heads(const Rows& rows, int64_t b, int64_t s, int64_t heads, int64_t width, T* buffer) {
  const Heads<S> placed = place_heads<T, S>(rows, b, s, width, buffer);
  if (static_cast<void*>(placed.data) == buffer) {
    const bool joined = rows.head_stride == width;
    for (int64_t head = 0; head < (joined ? 1 : heads); ++head)
      load_dense(start_of(rows, b, s, head), rows.dtype, joined ? heads * width : width, buffer + head * width);
  }
  return {placed.data, placed.stride};
}

void copy_heads(const Rows& from, const Rows& to, int64_t b, int64_t s, int64_t heads, int64_t width) {
  const bool joined = from.head_stride == width;
  for (int64_t head = 0; head < (joined ? 1 : heads); ++head)
    std::memcpy(start_of(to, b, s, head), start_of(from, b, s, head),
                (joined ? heads * width : width) * item_size(from.dtype));
}

template <typename T, typename S>
NFT_HD void normalize_head(const S* x, const S* weight, int64_t width, double eps, S* out) {
  const T squares = sums<T>(width, [&](int64_t k, T& sum, T&) { sum = fused(get(x[k]), get(x[k]), sum); }).first;
  const T inverse = 1 / std::sqrt(squares / static_cast<T>(width) + static_cast<T>(eps));
  each(width, [&](int64_t k) { set(out[k], get(x[k]) * inverse * get(weight[k])); });
}

template <typename T, typename S>
NFT_HD void differentiate_head(const S* x, const S* weight, const S* grad, int64_t width, double eps, S* out) {
  const auto [squares, with_x] = sums<T>(width, [&](int64_t k, T& square, T& product) {
    square = fused(get(x[k]), get(x[k]), square);
    product = fused(get(grad[k]) * get(weight[k]), get(x[k]), product);
  });
  const T share = 1 / static_cast<T>(width), inverse = 1 / std::sqrt(squares * share + static_cast<T>(eps));
  const T slope = with_x * share * inverse * inverse;
  each(width, [&](int64_t k) { set(out[k], inverse * fused(-slope, get(x[k]), get(grad[k]) * get(weight[k]))); });
}

// kWidth is that of the heads, or 0 for any: with few elements in each, the bookkeeping of loops takes a good part.
template <typename T, typename S, int64_t kWidth>
void normalize_heads(const QkNormArgs& a) {
  const int64_t rows = a.batch * a.length, width = kWidth ? kWidth : a.width;
#pragma omp parallel if (rows * a.heads * width >= kParallel)
  {
    Scratch<T> scratch(3, a.heads * width), weights(kMaxStreams, width);
    const S* weight[kMaxStreams];
    for (int j = 0; j < a.streams; ++j) weight[j] = load<T, S>(a.weight[j], 0, 0, width, weights[j]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = i / a.length, s = i % a.length;
      for (int j = 0; j < a.streams; ++j) {
        if (!weight[j]) {
          copy_heads(a.input[j], a.output[j], b, s, a.heads, width);
          continue;
        }
        const Heads<const S> x = load_heads<T, S>(a.input[j], b, s, a.heads, width, scratch[0]);
        const Heads<S> out = place_heads<T, S>(a.output[j], b, s, width, scratch[1]);
        if (a.grad[j].data) {
          const Heads<const S> grad = load_heads<T, S>(a.grad[j], b, s, a.heads, width, scratch[2]);
          for (int64_t h = 0; h < a.heads; ++h)
            differentiate_head<T, S>(x[h], weight[j], grad[h], width, a.eps, out[h]);
        } else {
          for (int64_t h = 0; h < a.heads; ++h) normalize_head<T, S>(x[h], weight[j], width, a.eps, out[h]);
        }
        // The heads of outputs are dense.
        store(a.output[j], b, s, a.heads * width, out.data);
      }
    }
  }
}

template <typename T, typename S>
void normalize_heads(const QkNormArgs& a) {
  if (a.width == 32) return normalize_heads<T, S, 32>(a);
  a.width == 64 ? normalize_heads<T, S, 64>(a) : normalize_heads<T, S, 0>(a);
}

constexpr double kSlope = 1.5957691216057308, kCube = 0.044715;  // 2 sqrt(2 / pi)

// -2u with GELU(x) = x sigmoid(2u): as (1 + tanh u) / 2 a sigmoid would lose its digits where x is negative.
template <typename T>
T exponent(T x) {
  return -static_cast<T>(kSlope) * x * fused(static_cast<T>(kCube) * x, x, T(1));
}

template <typename T>
T gelu_slope(T x) {
  // Beyond, it is 0 or 1 to the last bit, and infinities would meet zeros.
  x = x < -20 ? -20 : x > 20 ? 20 : x;
  const T e = exponential(exponent(x)), sigmoid = 1 / (1 + e);
  const T growth = static_cast<T>(kSlope) * fused(static_cast<T>(3 * kCube) * x, x, T(1));
  return sigmoid * fused(x * (e * sigmoid), growth, T(1));
}

template <typename T>
void activate(const GeluArgs& a) {
#pragma omp parallel if (a.elements >= kParallel)
  {
    Scratch<T> scratch(3, kChunk);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < a.elements; start += kChunk) {
      const int64_t count = std::min(kChunk, a.elements - start);
      // With a row stride of 1 the position is the element.
      const T* x = load<T, T>(a.x, 0, start, count, scratch[0]);
      T* out = place<T, T>(a.out, 0, start, scratch[1]);
      if (const T* grad = load<T, T>(a.grad, 0, start, count, scratch[2]))
        each(count, [&](int64_t k) { out[k] = grad[k] * gelu_slope(x[k]); });
      else
        each(count, [&](int64_t k) { out[k] = damped(x[k], exponent(x[k])); });
      store(a.out, 0, start, count, out);
    }
  }
}

}  // namespace

void layer_norm_modulate(const LayerNormArgs& a) {
  auto asked = [&](auto about) {
    return about(a.x, a.y, a.y2, a.y_bias, a.gate, a.gate2, a.scale, a.shift, a.scale2, a.shift2);
  };
  if (asked([](const auto&... x) { return any_double(x...); })) return forward<double, double>(a);
  asked([](const auto&... x) { return all_bf16(x...); }) ? forward<float, uint16_t>(a) : forward<float, float>(a);
}

void layer_norm_modulate_gradient(const LayerNormGradientArgs& a) {
  auto asked = [&](auto about) {
    return about(a.h, a.gate, a.gate2, a.scale, a.scale2, a.grad_h, a.grad_out, a.grad_out2);
  };
  if (asked([](const auto&... x) { return any_double(x...); })) return backward<double, double>(a);
  asked([](const auto&... x) { return all_bf16(x...); }) ? backward<float, uint16_t>(a) : backward<float, float>(a);
}

void qk_norm(const QkNormArgs& a) {
  bool wide = false, narrow = true;
  for (int j = 0; j < a.streams; ++j) {
    // What is copied is not computed with.
    if (!a.weight[j].data) continue;
    wide |= any_double(a.input[j], a.weight[j], a.grad[j]);
    narrow &= all_bf16(a.input[j], a.weight[j], a.grad[j], a.output[j]);
  }
  if (wide) return normalize_heads<double, double>(a);
  narrow ? normalize_heads<float, uint16_t>(a) : normalize_heads<float, float>(a);
}

void gelu(const GeluArgs& a) { any_double(a.x, a.grad) ? activate<double>(a) : activate<float>(a); }

}  // namespace NFT_ISA
}  // namespace nft

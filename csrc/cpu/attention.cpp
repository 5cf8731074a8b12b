// Attention over short sequences on the CPU, compiled once per instruction set (NFT_ISA names the namespace).
//
// A head is one task, so that no sum depends on the batch or the threads. All its products are one loop over tiles that
// stay in registers, which reads the left factor where it lies and the right one packed in the order of the loop.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "exp.h"
#include "kernels.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace nft {
namespace NFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
// Head of scores that are held at a time: of a few hundred keys, two buffers of them fit the second-level cache.
constexpr int64_t kBlock = 64;
// Terms after which a sum is added to the one before, as its error grows with its length.
constexpr int64_t kChain = 48;

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Lanes __attribute__((vector_size(4 * kWidth)));
constexpr std::make_integer_sequence<int, kWidth> kLanes;
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

NFT_HD Vec load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
NFT_HD void store(float* x, Vec value) { *reinterpret_cast<Unaligned*>(x) = value; }

NFT_HD Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

NFT_HD Vec every(float x) { return x - Vec{}; }
NFT_HD Vec plus(Vec a, Vec b) { return a + b; }
NFT_HD Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The lanes of a, then those of b, in another order.
template <int... kFrom>
NFT_HD Vec pick(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Lanes{kFrom...});
#endif
}

template <int kHalf, int... l>
NFT_HD void exchange(Vec& a, Vec& b, std::integer_sequence<int, l...>) {
  const Vec first = pick<(l & kHalf ? kWidth + l - kHalf : l)...>(a, b);
  b = pick<(l & kHalf ? kWidth + l : l + kHalf)...>(a, b);
  a = first;
}

template <int kHalf, int... l>
NFT_HD Vec swapped(Vec x, std::integer_sequence<int, l...>) {
  return pick<(l ^ kHalf)...>(x, x);
}

// In every lane what f makes of all of them.
template <int kHalf = kWidth / 2, typename F>
NFT_HD Vec across(Vec x, F f) {
  x = f(x, swapped<kHalf>(x, kLanes));
  if constexpr (kHalf > 1) return across<kHalf / 2>(x, f);
  return x;
}

template <int... l>
NFT_HD Vec first_lanes(Vec x, int32_t count, float rest, std::integer_sequence<int, l...>) {
  return Lanes{l...} < count ? x : every(rest);
}

int64_t vectors(int64_t count) { return (count + kWidth - 1) / kWidth; }

// One sample's head of a (B, S, H, d) tensor.
struct Head {
  float* data;
  int64_t stride;
  float* operator[](int64_t i) const { return data + i * stride; }
};

Head head_of(const View& x, int64_t b, int64_t head) {
  return {reinterpret_cast<float*>(sample_start(x, b)) + head * x.stride[1], x.stride[0]};
}

// The left factor: element (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// A right factor is packed in panels of a tile's width, row after row; zeros fill its last vector. Of the vectors that
// are left this many make a panel: with 6 rows, or 4 of 3 vectors, the sums of a tile take 12 of the 16 registers.
int64_t panel_width(int64_t left) { return left == 3 ? 3 : std::min<int64_t>(left, 2); }

using Tile = void (*)(int64_t depth, const Left& a, const float* b, float* c, int64_t stride, bool more);

template <int kRows, int kColumns>
void tile(int64_t depth, const Left& a, const float* b, float* c, int64_t stride, bool more) {
  Vec sum[kRows][kColumns]{};
  const float* left = a.data;
  const int64_t row = a.row, column = a.column;
  int64_t k = 0;
  // At least once: around a loop that may be skipped compilers keep the sums in memory.
  do {
    Vec right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * kWidth);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sum[i][j] = multiply_add(every(left[i * row]), right[j], sum[i][j]);
    left += column;
    b += kColumns * kWidth;
  } while (++k < depth);
  if (more)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sum[i][j] += load(c + i * stride + j * kWidth);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) store(c + i * stride + j * kWidth, sum[i][j]);
}

template <int kColumns, int... kRows>
constexpr Tile kTiles[] = {tile<kRows, kColumns>...};

// Calls body(first, count) for blocks of nearly the same length.
template <typename F>
void blocks(int64_t length, int64_t longest, F body) {
  const int64_t count = (length + longest - 1) / longest;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = length * b / count;
    body(first, length * (b + 1) / count - first);
  }
}

// c = a b, or c += a b if there is `more`; c has `rows` rows of `width` vectors and the packed b `depth` rows.
void multiply(int64_t rows, int64_t width, int64_t depth, const Left& a, const float* b, const Head& c, bool more) {
  for (int64_t j = 0, panel; j < width; j += panel, b += panel * kWidth * depth) {
    panel = panel_width(width - j);
    const Tile* tiles = panel == 1   ? kTiles<1, 1, 2, 3, 4, 5, 6>
                        : panel == 2 ? kTiles<2, 1, 2, 3, 4, 5, 6>
                                     : kTiles<3, 1, 2, 3, 4>;
    const int64_t most = panel == 3 ? 4 : 6;
    blocks(depth, kChain, [&](int64_t first, int64_t there) {
      // Of nearly the same height, as a tile of few rows waits for its own sums.
      for (int64_t i = 0, height, left = (rows + most - 1) / most; i < rows; i += height, --left) {
        height = (rows - i + left - 1) / left;
        tiles[height - 1](there, {a.data + i * a.row + first * a.column, a.row, a.column}, b + first * panel * kWidth,
                          c[i] + j * kWidth, c.stride, more || first > 0);
      }
    });
  }
}

// x (count, d) as a right factor.
void pack(const Head& x, int64_t count, int64_t d, float* out) {
  const int64_t width = vectors(d);
  for (int64_t j = 0, panel; j < width; j += panel) {
    panel = panel_width(width - j);
    const int64_t begin = j * kWidth, length = panel * kWidth, there = std::min(d - begin, length);
    for (int64_t i = 0; i < count; ++i, out += length) {
      const float* from = x[i] + begin;
      if (there == length)
        for (int64_t l = 0; l < length; l += kWidth) store(out + l, load(from + l));
      else
        for (int64_t l = 0; l < length; ++l) out[l] = l < there ? from[l] : 0;
    }
  }
}

template <int kHalf>
NFT_HD void transpose(Vec (&x)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kHalf)) exchange<kHalf>(x[i], x[i + kHalf], kLanes);
  if constexpr (kHalf > 1) transpose<kHalf / 2>(x);
}

// The transpose of x (count, d) as a right factor.
void pack_transposed(const Head& x, int64_t count, int64_t d, float* out) {
  const int64_t width = vectors(count);
  for (int64_t j = 0, panel; j < width; j += panel) {
    panel = panel_width(width - j);
    for (int64_t p = 0; p < panel; ++p) {
      const int64_t begin = (j + p) * kWidth;
      for (int64_t k = 0; k < d; k += kWidth) {
        const float* from = x[begin] + k;
        int64_t stride = x.stride;
        float edge[kWidth * kWidth];
        if (begin + kWidth > count || k + kWidth > d) {
          std::fill_n(edge, kWidth * kWidth, 0.0f);
          for (int64_t l = 0; l < std::min<int64_t>(kWidth, count - begin); ++l)
            std::copy_n(from + l * stride, std::min<int64_t>(kWidth, d - k), edge + l * kWidth);
          from = edge, stride = kWidth;
        }
        Vec square[kWidth];
        for (int l = 0; l < kWidth; ++l) square[l] = load(from + l * stride);
        transpose<kWidth / 2>(square);
        for (int l = 0; l < kWidth; ++l)
          if (k + l < d) store(out + ((k + l) * panel + p) * kWidth, square[l]);
      }
    }
    out += panel * kWidth * d;
  }
}

// exp(scale (s - max)) over its sum, of rows of scores that are followed by room for whole vectors. Every step is taken
// for all rows before the next: within a row each has to wait for the one before.
void softmax(const Head& s, int64_t rows, int64_t count, float scale) {
  const int64_t padded = vectors(count) * kWidth;
  float largest[kBlock];
  for (int64_t i = 0; i < rows; ++i) {
    float* last = s[i] + padded - kWidth;
    store(last, first_lanes(load(last), count - (padded - kWidth), -std::numeric_limits<float>::infinity(), kLanes));
    Vec most = load(s[i]);
    for (int64_t k = kWidth; k < padded; k += kWidth) most = larger(load(s[i] + k), most);
    largest[i] = across(most, larger)[0];
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s[i];
    const float most = largest[i];
    for (int64_t k = 0; k < padded; ++k) {
      const float x = (row[k] - most) * scale;
      // A weight that would be subnormal is none.
      row[k] = x < -87.3f ? 0.0f : exponential(x);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    Vec sum{};
    for (int64_t k = 0; k < padded; k += kWidth) sum += load(s[i] + k);
    const Vec share = 1 / across(sum, plus);
    for (int64_t k = 0; k < padded; k += kWidth) store(s[i] + k, load(s[i] + k) * share);
  }
}

// Gradient of the scores before their scale, in place of that of the weights p.
void softmax_gradient(const float* p, float* grad, int64_t count, float scale) {
  const int64_t padded = vectors(count) * kWidth;
  Vec sum{};
  for (int64_t k = 0; k < padded; k += kWidth) sum = multiply_add(load(p + k), load(grad + k), sum);
  sum = across(sum, plus);
  for (int64_t k = 0; k < padded; k += kWidth) store(grad + k, load(p + k) * (load(grad + k) - sum) * scale);
}

// Memory of a thread that begins with a line of the cache.
struct Buffer {
  explicit Buffer(int64_t size) : memory(size + 16) {
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
  }
  std::vector<float> memory;
  float* data;
};

// Where rows of d elements may be computed in whole vectors: in the tensor itself, or else in a buffer.
Head place(const Head& out, float* buffer, int64_t d) {
  return d % kWidth ? Head{buffer, vectors(d) * kWidth} : out;
}

void finish(const Head& from, const Head& out, int64_t count, int64_t d) {
  if (from.data == out.data) return;
  for (int64_t i = 0; i < count; ++i) std::copy_n(from[i], d, out[i]);
}

}  // namespace

void attention(const AttentionArgs& a) {
  const int64_t length = a.q.size[0], heads = a.q.size[1], d = a.q.size[2];
  const int64_t width = vectors(d), padded = vectors(length) * kWidth, block = std::min(length, kBlock);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
#pragma omp parallel
  {
    Buffer keys(padded * d), values(length * width * kWidth), scores(block * padded), held(block * width * kWidth);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.batch * heads; ++task) {
      const int64_t b = task / heads, head = task % heads;
      const Head q = head_of(a.q, b, head), out = head_of(a.out, b, head);
      pack_transposed(head_of(a.k, b, head), length, d, keys.data);
      pack(head_of(a.v, b, head), length, d, values.data);
      blocks(length, kBlock, [&](int64_t first, int64_t count) {
        const Head s{scores.data, padded}, to{out[first], out.stride}, made = place(to, held.data, d);
        multiply(count, padded / kWidth, d, {q[first], q.stride, 1}, keys.data, s, false);
        softmax(s, count, length, scale);
        multiply(count, width, length, {s.data, padded, 1}, values.data, made, false);
        finish(made, to, count, d);
      });
    }
  }
}

// The weights are computed anew, which takes less than to write and read them.
void attention_gradient(const AttentionArgs& a) {
  const int64_t length = a.q.size[0], heads = a.q.size[1], d = a.q.size[2];
  const int64_t width = vectors(d), padded = vectors(length) * kWidth, block = std::min(length, kBlock);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
#pragma omp parallel
  {
    Buffer keys_across(padded * d), values_across(padded * d), keys(length * width * kWidth);
    Buffer queries(block * width * kWidth), outs(block * width * kWidth);
    Buffer weights(block * padded), scores(block * padded);
    Buffer held_q(block * width * kWidth), held_k(length * width * kWidth), held_v(length * width * kWidth);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.batch * heads; ++task) {
      const int64_t b = task / heads, head = task % heads;
      const Head q = head_of(a.q, b, head), k = head_of(a.k, b, head), grad = head_of(a.out, b, head);
      const Head grad_q = head_of(a.grad_q, b, head), grad_k = head_of(a.grad_k, b, head);
      const Head grad_v = head_of(a.grad_v, b, head);
      const Head made_k = place(grad_k, held_k.data, d), made_v = place(grad_v, held_v.data, d);
      pack_transposed(k, length, d, keys_across.data);
      pack_transposed(head_of(a.v, b, head), length, d, values_across.data);
      pack(k, length, d, keys.data);
      blocks(length, kBlock, [&](int64_t first, int64_t count) {
        const Head here{q[first], q.stride}, grad_here{grad[first], grad.stride}, to{grad_q[first], grad_q.stride};
        const Head p{weights.data, padded}, s{scores.data, padded}, made_q = place(to, held_q.data, d);
        multiply(count, padded / kWidth, d, {here.data, here.stride, 1}, keys_across.data, p, false);
        multiply(count, padded / kWidth, d, {grad_here.data, grad_here.stride, 1}, values_across.data, s, false);
        softmax(p, count, length, scale);
        for (int64_t i = 0; i < count; ++i) softmax_gradient(p[i], s[i], length, scale);
        multiply(count, width, length, {s.data, padded, 1}, keys.data, made_q, false);
        finish(made_q, to, count, d);
        pack(here, count, d, queries.data);
        pack(grad_here, count, d, outs.data);
        multiply(length, width, count, {s.data, 1, padded}, queries.data, made_k, first > 0);
        multiply(length, width, count, {p.data, 1, padded}, outs.data, made_v, first > 0);
      });
      finish(made_k, grad_k, length, d);
      finish(made_v, grad_v, length, d);
    }
  }
}

}  // namespace NFT_ISA
}  // namespace nft

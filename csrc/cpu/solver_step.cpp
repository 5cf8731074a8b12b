// One row of a solver's table on the CPU, applied in one pass over memory; compiled once per instruction set (NFT_ISA
// names the namespace).
#include <algorithm>
#include <vector>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

// All tensors of a row fit the first-level cache together.
constexpr int64_t kStepChunk = 1024;

template <typename T>
struct Buffers {
  alignas(64) T x[kStepChunk], v[kStepChunk], other[kStepChunk], h[kStepChunk], out[kStepChunk], older[3][kStepChunk];
};

// h = p x + q v and out = keep x + sum_j b[j] h_j for up to three older entries, in one loop for each number of them.
template <typename T, int kOlder, typename S>
void combine(const StepArgs& a, const S* __restrict x, const S* __restrict v, const S* const* older, int64_t count,
             S* __restrict h, S* __restrict out) {
  const T keep = static_cast<T>(a.a), first = static_cast<T>(a.b[0]), p = static_cast<T>(a.p), q = static_cast<T>(a.q);
  const T b1 = static_cast<T>(a.b[1]), b2 = static_cast<T>(a.b[2]), b3 = static_cast<T>(a.b[3]);
  const S *__restrict h1 = older[0], *__restrict h2 = older[1], *__restrict h3 = older[2];
  for (int64_t k = 0; k < count; ++k) {
    const T state = get(x[k]), newest = p * state + q * get(v[k]);
    T sum = keep * state + first * newest;
    if (kOlder > 0) sum += b1 * get(h1[k]);
    if (kOlder > 1) sum += b2 * get(h2[k]);
    if (kOlder > 2) sum += b3 * get(h3[k]);
    set(h[k], newest);
    set(out[k], sum);
  }
}

template <typename T, typename S>
void combine(const StepArgs& a, int older_count, const S* x, const S* v, const S* const* older, int64_t count, S* h,
             S* out) {
  switch (older_count) {
    case 0: combine<T, 0>(a, x, v, older, count, h, out); break;
    case 1: combine<T, 1>(a, x, v, older, count, h, out); break;
    case 2: combine<T, 2>(a, x, v, older, count, h, out); break;
    default: combine<T, 3>(a, x, v, older, count, h, out);
  }
}

// Whether a row is only h and out of bfloat16 tensors without gaps, which then need no buffers.
bool all_bf16(const StepArgs& a) {
  bool all = !a.guided && !a.want_x0 && a.c == 0 && a.terms <= 4;
  all = all && plain_bf16(a.x) && plain_bf16(a.v) && plain_bf16(a.out) && (!a.want_h || plain_bf16(a.h));
  for (int j = 1; j < a.terms; ++j) all = all && plain_bf16(a.history[j]);
  return all;
}

void bf16_chunk(const StepArgs& a, int64_t b, int64_t start, int64_t count) {
  const auto at = [&](const View& view) { return reinterpret_cast<uint16_t*>(sample_start(view, b)) + start; };
  uint16_t unwanted[kStepChunk];
  const uint16_t* older[3] = {};
  for (int j = 1; j < a.terms; ++j) older[j - 1] = at(a.history[j]);
  combine<float, uint16_t>(a, a.terms - 1, at(a.x), at(a.v), older, count, a.want_h ? at(a.h) : unwanted, at(a.out));
}

// Returns the sum of z^2 where it is wanted.
template <typename T>
double step_chunk(const StepArgs& a, int64_t b, int64_t start, int64_t count, Buffers<T>& buf) {
  const T* x = load(a.x, b, start, count, buf.x);
  const T* v = load(a.v, b, start, count, buf.v);
  if (a.guided) {
    const T* v_uncond = load(a.v_uncond, b, start, count, buf.other);
    const T guidance = static_cast<T>(a.guidance);
    for (int64_t k = 0; k < count; ++k) buf.v[k] = v_uncond[k] + guidance * (v[k] - v_uncond[k]);
    v = buf.v;
  }
  T* h = a.want_h ? place(a.h, b, start, buf.h) : buf.h;
  T* out = place(a.out, b, start, buf.out);
  const T* older[3] = {};
  const int near = std::min(a.terms - 1, 3);
  for (int j = 0; j < near; ++j) older[j] = load(a.history[j + 1], b, start, count, buf.older[j]);
  combine<T, T>(a, near, x, v, older, count, h, out);
  if (a.want_h && h == buf.h) store(a.h, b, start, count, h);
  if (a.want_x0) {
    const T t = static_cast<T>(a.t);
    for (int64_t k = 0; k < count; ++k) buf.h[k] = x[k] - t * v[k];
    store(a.x0, b, start, count, buf.h);
  }
  for (int j = 4; j < a.terms; ++j) {
    const T* far = load(a.history[j], b, start, count, buf.other);
    const T weight = static_cast<T>(a.b[j]);
    for (int64_t k = 0; k < count; ++k) out[k] += weight * far[k];
  }
  double square = 0;
  if (a.c > 0) {
    const T* z = buf.other;
    if (a.has_noise)
      z = load(a.noise, b, start, count, buf.other);
    else
      draw(a.seed[b], a.sample[b], start, count, buf.other);
    const T deviation = static_cast<T>(a.c);
    for (int64_t k = 0; k < count; ++k) out[k] += deviation * z[k];
    if (a.z_square) {
      T lanes[kLanes] = {0};
      int64_t k = 0;
      for (; k + kLanes <= count; k += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += z[k + l] * z[k + l];
      for (int l = 0; k < count; ++k, ++l) lanes[l] += z[k] * z[k];
      square = total(lanes);
    }
  }
  if (out == buf.out) store(a.out, b, start, count, out);
  return square;
}

template <typename T>
void step(const StepArgs& a) {
  const int64_t chunks = (a.elements + kStepChunk - 1) / kStepChunk;
  const bool direct = all_bf16(a);
  std::vector<double> squares(a.z_square ? a.batch * chunks : 0);
#pragma omp parallel
  {
    Buffers<T> buf;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * chunks; ++item) {
      const int64_t b = item / chunks, start = item % chunks * kStepChunk;
      const int64_t count = std::min(kStepChunk, a.elements - start);
      if (direct) {
        bf16_chunk(a, b, start, count);
        continue;
      }
      const double square = step_chunk<T>(a, b, start, count, buf);
      if (a.z_square) squares[item] = square;
    }
  }
  if (!a.z_square) return;
  for (int64_t b = 0; b < a.batch; ++b) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += squares[b * chunks + c];
    a.z_square[b] = sum / static_cast<double>(a.elements);
  }
}

}  // namespace

void solver_step(const StepArgs& args) {
  expect_writes(args.out, args.batch, args.elements);
  if (args.want_h) expect_writes(args.h, args.batch, args.elements);
  args.double_math ? step<double>(args) : step<float>(args);
}

}  // namespace NFT_ISA
}  // namespace nft

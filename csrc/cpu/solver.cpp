// One row of a solver's table, applied in one pass over memory.
#include <algorithm>
#include <vector>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

template <typename T>
struct Buffers {
  alignas(64) T x[kChunk], v[kChunk], other[kChunk], combined[kChunk], h[kChunk], out[kChunk];
};

// Returns the sum of z^2 where it is wanted.
template <typename T>
double step_chunk(const StepArgs& a, int64_t b, int64_t start, int64_t count, Buffers<T>& buf) {
  const T* x = load(a.x, b, start, count, buf.x);
  const T* v = load(a.v, b, start, count, buf.v);
  if (a.guided) {
    const T* v_uncond = load(a.v_uncond, b, start, count, buf.other);
    const T guidance = static_cast<T>(a.guidance);
    for (int64_t k = 0; k < count; ++k) buf.combined[k] = v_uncond[k] + guidance * (v[k] - v_uncond[k]);
    v = buf.combined;
  }
  const T keep = static_cast<T>(a.a), first = static_cast<T>(a.b[0]), p = static_cast<T>(a.p), q = static_cast<T>(a.q);
  T *h = buf.h, *out = buf.out;
  for (int64_t k = 0; k < count; ++k) {
    h[k] = p * x[k] + q * v[k];
    out[k] = keep * x[k] + first * h[k];
  }
  if (a.want_h) store(a.h, b, start, count, h);
  if (a.want_x0) {
    const T t = static_cast<T>(a.t);
    for (int64_t k = 0; k < count; ++k) h[k] = x[k] - t * v[k];
    store(a.x0, b, start, count, h);
  }
  for (int j = 1; j < a.terms; ++j) {
    const T* older = load(a.history[j], b, start, count, buf.other);
    const T weight = static_cast<T>(a.b[j]);
    for (int64_t k = 0; k < count; ++k) out[k] += weight * older[k];
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
  store(a.out, b, start, count, out);
  return square;
}

template <typename T>
void step(const StepArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
  std::vector<double> squares(a.z_square ? a.batch * chunks : 0);
#pragma omp parallel
  {
    Buffers<T> buf;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * chunks; ++item) {
      const int64_t b = item / chunks, start = item % chunks * kChunk;
      const double square = step_chunk<T>(a, b, start, std::min(kChunk, a.elements - start), buf);
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

void solver_step(const StepArgs& args) { args.double_math ? step<double>(args) : step<float>(args); }

}  // namespace NFT_ISA
}  // namespace nft

// x_t = (1-t) x0 + t eps on the CPU, with eps given or drawn here; compiled once per instruction set (NFT_ISA names the
// namespace).
#include <algorithm>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

template <typename T>
void noise(const NoiseArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
#pragma omp parallel
  {
    alignas(64) T x0_buffer[kChunk], eps_buffer[kChunk], x_t[kChunk];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * chunks; ++item) {
      const int64_t b = item / chunks, start = item % chunks * kChunk, count = std::min(kChunk, a.elements - start);
      const T* x0 = load(a.x0, b, start, count, x0_buffer);
      const T* eps = eps_buffer;
      if (a.has_noise)
        eps = load(a.noise, b, start, count, eps_buffer);
      else
        draw(a.seed[b], a.sample[b], start, count, eps_buffer);
      const double time = unit(value(a.t, b));
      const T t = static_cast<T>(time), keep = static_cast<T>(1 - time);
      for (int64_t k = 0; k < count; ++k) x_t[k] = keep * x0[k] + t * eps[k];
      store(a.out, b, start, count, x_t);
      if (a.want_wide) store(a.wide, b, start, count, x_t);
    }
  }
}

}  // namespace

void add_noise(const NoiseArgs& args) {
  expect_writes(args.out, args.batch, args.elements);
  args.double_math ? noise<double>(args) : noise<float>(args);
}

}  // namespace NFT_ISA
}  // namespace nft

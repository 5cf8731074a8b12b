// One row of a solver's table, applied in one pass over memory.
#include "launch.cuh"
#include "reduce.cuh"
#include "view.cuh"

namespace nft {
namespace cuda {
namespace {

// squares: the sum of z^2 of every slice, where it is wanted.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPacked ? 2 : 1)
    step_kernel(const __grid_constant__ StepArgs a, const __grid_constant__ Slices slices, Sum<double>* squares) {
  __shared__ Sum<T> warps[kWarps];
  const T guidance = static_cast<T>(a.guidance), p = static_cast<T>(a.p), q = static_cast<T>(a.q);
  const T keep = static_cast<T>(a.a), first = static_cast<T>(a.b[0]), time = static_cast<T>(a.t);
  const T deviation = static_cast<T>(a.c);
  const bool noisy = a.c > 0, drawn = noisy && !a.has_noise;
  for (int64_t item = blockIdx.x; item < a.batch * slices.splits; item += gridDim.x) {
    const int64_t b = item / slices.splits, split = item % slices.splits;
    const int64_t seed = drawn ? a.seed[b] : 0, sample = drawn ? a.sample[b] : 0;
    Sum<T> square{};
    for (int64_t pack = slices.first(split) + threadIdx.x; pack < slices.last(split); pack += blockDim.x) {
      const Place place{b, pack * kPack<T>, a.elements};
      Bits x_bits = fetch<T, kPacked>(a.x, place), v_bits = fetch<T, kPacked>(a.v, place);
      Bits u_bits{};
      if (a.guided) u_bits = fetch<T, kPacked>(a.v_uncond, place);
      const Pack<T> x = unpack<T>(x_bits, a.x.dtype);
      Pack<T> v = unpack<T>(v_bits, a.v.dtype), out, written;
      if (a.guided) {
        const Pack<T> v_uncond = unpack<T>(u_bits, a.v_uncond.dtype);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) v.v[j] = v_uncond.v[j] + guidance * (v.v[j] - v_uncond.v[j]);
      }
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        written.v[j] = p * x.v[j] + q * v.v[j];
        out.v[j] = keep * x.v[j] + first * written.v[j];
      }
      if (a.want_h) store<T, kPacked>(a.h, place, written);
      if (a.want_x0) {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) written.v[j] = x.v[j] - time * v.v[j];
        store<T, kPacked>(a.x0, place, written);
      }
      for (int i = 1; i < a.terms; ++i) {
        const Pack<T> older = load<T, kPacked>(a.history[i], place);
        const T weight = static_cast<T>(a.b[i]);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) out.v[j] += weight * older.v[j];
      }
      if (noisy) {
        const Pack<T> z = drawn ? draw<T>(seed, sample, pack) : load<T, kPacked>(a.noise, place);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) {
          out.v[j] += deviation * z.v[j];
          // The normals of the last counter may reach past the end.
          if (pack * kPack<T> + j < a.elements) square.value += z.v[j] * z.v[j];
        }
      }
      store<T, kPacked>(a.out, place, out);
    }
    if (squares == nullptr) continue;
    const Sum<double> total = block_total(square, warps);
    if (threadIdx.x == 0) squares[item] = total;
  }
}

// A warp per sample.
__global__ void square_means(const Sum<double>* squares, double* z_square, int64_t batch, int64_t splits,
                             double elements) {
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    Sum<double> sum{};
    for (int64_t split = threadIdx.x; split < splits; split += 32) sum.add(squares[b * splits + split]);
    sum = warp_total(sum);
    if (threadIdx.x == 0) z_square[b] = sum.value / elements;
  }
}

}  // namespace

void solver_step(const StepArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  std::vector<const View*> views{&a.x, &a.v, &a.v_uncond, &a.noise, &a.out, &a.h, &a.x0};
  for (const View& older : a.history) views.push_back(&older);
  choose_variant(a.double_math, a.batch, a.elements, views, [&](auto zero, auto is_packed) {
    using T = decltype(zero);
    const Slices slices = slices_of(a.batch, packs_of<T>(a.elements));
    auto* squares = a.z_square ? static_cast<Sum<double>*>(queue.workspace) : nullptr;
    launch(step_kernel<T, is_packed.value>, shape_of(a.batch, slices), queue, a, slices, squares);
    if (squares == nullptr) return;
    const Shape warp_per_sample{std::min<int64_t>(a.batch, 0x7fffffff), 32};
    launch(square_means, warp_per_sample, queue, squares, a.z_square, a.batch, slices.splits,
           static_cast<double>(a.elements));
  });
}

}  // namespace cuda
}  // namespace nft

// x_t = (1-t) x0 + t eps, with eps given or drawn here.
#include "launch.cuh"
#include "view.cuh"

namespace nft {
namespace cuda {
namespace {

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPacked ? 2 : 1)
    add_noise_kernel(const __grid_constant__ NoiseArgs a, const __grid_constant__ Slices slices) {
  for (int64_t item = blockIdx.x; item < a.batch * slices.splits; item += gridDim.x) {
    const int64_t b = item / slices.splits, split = item % slices.splits;
    const int64_t seed = a.has_noise ? 0 : a.seed[b], sample = a.has_noise ? 0 : a.sample[b];
    const double time = unit(value(a.t, b));
    const T t = static_cast<T>(time), keep = static_cast<T>(1 - time);
    for (int64_t pack = slices.first(split) + threadIdx.x; pack < slices.last(split); pack += blockDim.x) {
      const Place place{b, pack * kPack<T>, a.elements};
      const Bits x0_bits = fetch<T, kPacked>(a.x0, place);
      const Pack<T> eps =
          a.has_noise ? load<T, kPacked>(a.noise, place) : draw<T>(seed, sample, pack);
      const Pack<T> x0 = unpack<T>(x0_bits, a.x0.dtype);
      Pack<T> out;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out.v[j] = keep * x0.v[j] + t * eps.v[j];
      store<T, kPacked>(a.out, place, out);
      if (a.want_wide) store<T, kPacked>(a.wide, place, out);
    }
  }
}

}  // namespace

std::string why_not(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, add_noise_kernel<float, true>));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void add_noise(const NoiseArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  choose_variant(a.double_math, a.batch, a.elements, {&a.x0, &a.noise, &a.out, &a.wide}, [&](auto zero, auto is_packed) {
    using T = decltype(zero);
    const Slices slices = slices_of(a.batch, packs_of<T>(a.elements));
    launch(add_noise_kernel<T, is_packed.value>, shape_of(a.batch, slices), queue, a, slices);
  });
}

}  // namespace cuda
}  // namespace nft

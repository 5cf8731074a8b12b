// The loss and its gradient. Where a thread-block cluster can hold a sample's errors, or all processors together those
// of a large one, one launch reads every input once; elsewhere a first launch adds up slices of samples and a second
// reads the inputs again for the gradient. kGeneral kernels, always in two launches, know what the common ones leave
// out: masks, policy weights, r per element, segments, and gradients through the weights.
#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <tuple>

#include "launch.cuh"
#include "reduce.cuh"
#include "view.cuh"

namespace nft {
namespace cuda {
namespace {

template <typename T>
struct Errors {
  Pack<T> positive, negative, delta;  // e+, e- and v_theta - v_ref
  Pack<T> mask, of_policy, r;         // kGeneral only
};

template <typename T, bool kGeneral>
using SumsOf = std::conditional_t<kGeneral, WeightedSums<T>, Sums<T>>;

// Past the end of the sample the mask is zero.
template <typename T>
__device__ void load_weights(const LossArgs& a, int64_t b, const Place& place, Errors<T>& e) {
  const T r = a.r_per_element ? T(0) : static_cast<T>(unit(value(a.r, b)));
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    e.mask.v[j] = place.first + j < place.end ? T(1) : T(0);
    e.r.v[j] = r;
  }
  if (a.has_mask) e.mask = load<T, false>(a.mask, place);
  if (a.r_per_element) e.r = load<T, false>(a.r_elements, place);
  e.of_policy = e.mask;
  if (!a.has_policy_weight) return;
  const Pack<T> weight = load<T, false>(a.policy_weight, place);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) e.of_policy.v[j] *= weight.v[j];
}

__device__ Sample sample_of(const LossArgs& a, int64_t b) {
  return {unit(value(a.t, b)), unit(value(a.r, b)), value(a.beta, b), value(a.loss_weight, b)};
}

template <typename T>
__device__ Affine<T> affine_of(const LossArgs& a, int64_t b) {
  return affine<T>(a.prediction, unit(value(a.t, b)), value(a.beta, b));
}

// Past the end of the sample all inputs are zero, and so is what they add to the sums. The numbers of the sample are
// asked for when the elements are on their way, so that nothing waits for one load before it starts the next.
template <typename T, bool kPacked, bool kGeneral, typename AskAffine>
__device__ Errors<T> load_errors(const LossArgs& a, int64_t b, const Place& place, const AskAffine& ask_affine,
                                 SumsOf<T, kGeneral>& sums) {
  auto fetch_of = [&](const View& view) { return fetch<T, kPacked>(view, place); };
  const Bits v_theta_bits = fetch_of(a.v_theta), v_old_bits = fetch_of(a.v_old), x_t_bits = fetch_of(a.x_t);
  const Bits x0_bits = fetch_of(a.x0);
  Bits v_ref_bits{};
  if (a.has_ref) v_ref_bits = fetch_of(a.v_ref);
  const Affine<T> f = ask_affine();
  const Pack<T> v_theta = unpack<T>(v_theta_bits, a.v_theta.dtype), v_old = unpack<T>(v_old_bits, a.v_old.dtype);
  const Pack<T> x_t = unpack<T>(x_t_bits, a.x_t.dtype), x0 = unpack<T>(x0_bits, a.x0.dtype);
  const Pack<T> v_ref = unpack<T>(v_ref_bits, a.v_ref.dtype);
  Errors<T> e;
  if constexpr (kGeneral) load_weights(a, b, place, e);
  SumsOf<T, kGeneral> pack_sums{};
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    T d, base, &positive = e.positive.v[j], &negative = e.negative.v[j], &delta = e.delta.v[j];
    errors(v_theta.v[j], v_old.v[j], x_t.v[j], x0.v[j], f, d, base);
    positive = fused(f.step, d, base);
    negative = fused(-f.step, d, base);
    delta = a.has_ref ? v_theta.v[j] - v_ref.v[j] : 0;
    if constexpr (kGeneral) {
      const T m = e.mask.v[j], of_policy = e.of_policy.v[j], r = e.r.v[j];
      // Padding may hold anything, NaN included.
      if (!(m > 0)) d = positive = negative = delta = 0;
      pack_sums.add(WeightedSums<T>{
          {m * std::abs(positive), m * std::abs(negative), m * (positive * positive), m * (negative * negative),
           m * (delta * delta), m * std::abs(d), std::abs(d)},
          m, of_policy * (r * (positive * positive)), of_policy * ((1 - r) * (negative * negative))});
    } else {
      pack_sums.add(Sums<T>{std::abs(positive), std::abs(negative), positive * positive, negative * negative,
                            delta * delta, std::abs(d), std::abs(d)});
    }
  }
  sums.add(pack_sums);
  return e;
}

NFT_HD bool with_kl(const LossArgs& a) { return a.has_ref && a.kl_weight > 0; }

template <typename T, bool kPacked, bool kGeneral>
__device__ void store_gradient(const LossArgs& a, const Place& place, const Errors<T>& e, const Coefficients& c) {
  const T positive = static_cast<T>(c.positive), negative = static_cast<T>(c.negative), kl = static_cast<T>(c.kl);
  Pack<T> grad;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    const T m = kGeneral ? e.mask.v[j] : T(1);
    if constexpr (kGeneral)
      grad.v[j] = policy_gradient(c, m, e.of_policy.v[j], e.r.v[j], e.positive.v[j], e.negative.v[j]);
    else
      grad.v[j] = positive * e.positive.v[j] + negative * e.negative.v[j];
    if (with_kl(a)) grad.v[j] += kl * m * e.delta.v[j];
    if constexpr (kGeneral) grad.v[j] = m > 0 ? grad.v[j] : 0;
  }
  store<T, kPacked>(a.grad, place, grad);
}

template <typename T, bool kGeneral>
__device__ Coefficients finish_sample(const LossArgs& a, int64_t b, const Sample& sample,
                                      const SumsOf<double, kGeneral>& sums, bool write) {
  double details[kDetails];
  Coefficients c;
  if constexpr (kGeneral)
    c = finish(a, sample, sums, details);
  else
    c = finish(a, sample, sums, a.elements, details);
  if (write) {
#pragma unroll
    for (int i = 0; i < kDetails; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(details[i]);
  }
  return c;
}

// The scalar loss from the details of all samples; called by a whole block.
template <typename T>
__device__ void add_losses(const LossArgs& a) {
  __shared__ Sum<double> warps[kWarps];
  const T *policy = static_cast<const T*>(a.details), *kl = policy + 5 * a.batch;
  const double* weight = static_cast<const double*>(a.loss_weight.data);
  Sum<double> sum{};
  // Tokens may be many samples, whose loads should not wait for each other.
  for (int64_t first = threadIdx.x; first < a.batch; first += 4 * blockDim.x) {
    T losses[4], kls[4];
    double weights[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t b = first + k * blockDim.x, here = b < a.batch ? b : first;
      // Past the first-level cache, which knows nothing of what other blocks wrote.
      losses[k] = __ldcg(policy + here);
      kls[k] = __ldcg(kl + here);
      weights[k] = weight ? weight[here * a.loss_weight.stride] : a.loss_weight.constant;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (first + k * blockDim.x < a.batch)
        sum.value += (static_cast<double>(losses[k]) + a.kl_weight * static_cast<double>(kls[k])) * weights[k];
  }
  sum = block_total(sum, warps);
  if (threadIdx.x == 0) *static_cast<T*>(a.loss) = static_cast<T>(sum.value);
}

// Called by one whole block per sample, after its thread 0 wrote the details. The block that finds all samples done
// adds up the scalar loss.
template <typename T>
__device__ void count_sample(const LossArgs& a, unsigned long long* finished) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1ull) + 1 == static_cast<unsigned long long>(a.batch);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  add_losses<T>(a);
}

// A block's packs of a sample, and their errors in shared memory, where every thread keeps those of its own packs until
// the sums of the whole sample tell the gradient's coefficients.
struct Held {
  int64_t b, first;
  int count, length;
  uint4* words;

  template <typename T>
  __device__ Place place(const LossArgs& a, int pack) const {
    return {b, (first + pack) * kPack<T>, a.elements};
  }
  // Words of the same kind lie side by side, so that a warp's accesses do not collide.
  template <typename T>
  __device__ void put(int kind, int pack, const Pack<T>& values) const {
    uint4 two[2];
    memcpy(two, &values, sizeof two);
    words[2 * kind * length + pack] = two[0];
    words[(2 * kind + 1) * length + pack] = two[1];
  }
  template <typename T>
  __device__ Pack<T> get(int kind, int pack) const {
    const uint4 two[2] = {words[2 * kind * length + pack], words[(2 * kind + 1) * length + pack]};
    Pack<T> values;
    memcpy(&values, two, sizeof two);
    return values;
  }
};

__device__ Held held_of(int64_t b, const Slices& slices, int64_t split, uint4* words) {
  const int64_t first = slices.first(split);
  return {b, first, static_cast<int>(slices.last(split) - first), static_cast<int>(slices.length), words};
}

// This thread's sums over its packs; without a gradient nothing is held.
template <typename T, bool kPacked, typename AskMore>
__device__ Sums<T> sum_and_hold(const LossArgs& a, const Held& held, const AskMore& ask_more) {
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Affine<T> f;
  Sums<T> sums{};
  for (int pack = me; pack < held.count; pack += threads) {
    auto ask_affine = [&] {
      if (pack == me) ask_more();
      return f = pack == me ? affine_of<T>(a, held.b) : f;
    };
    const Errors<T> e = load_errors<T, kPacked, false>(a, held.b, held.place<T>(a, pack), ask_affine, sums);
    if (!a.want_grad) continue;
    held.put(0, pack, e.positive);
    held.put(1, pack, e.negative);
    if (with_kl(a)) held.put(2, pack, e.delta);
  }
  return sums;
}

template <typename T, bool kPacked>
__device__ void store_held_gradient(const LossArgs& a, const Held& held, const Coefficients& c) {
  const int threads = static_cast<int>(blockDim.x);
  for (int pack = static_cast<int>(threadIdx.x); a.want_grad && pack < held.count; pack += threads) {
    Errors<T> e{held.get<T>(0, pack), held.get<T>(1, pack), {}};
    if (with_kl(a)) e.delta = held.get<T>(2, pack);
    store_gradient<T, kPacked, false>(a, held.place<T>(a, pack), e, c);
  }
}

// Blocks that share a processor where the elements are packed, as registers allow without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kClusterBlocks = 2;
#else
constexpr int kClusterBlocks = 3;
#endif

// One cluster per sample.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPacked ? kClusterBlocks : 1)
    loss_in_clusters(const __grid_constant__ LossArgs a, int64_t packs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ uint4 words[];
  __shared__ Sums<T> warps[kWarps];
  __shared__ Sample sample;
  __shared__ Coefficients coefficients;
  const auto cluster = cooperative_groups::this_cluster();
  const int ranks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int64_t b = blockIdx.x / ranks;
  const Held held = held_of(b, {packs, ranks, (packs + ranks - 1) / ranks}, rank, words);
  const int me = static_cast<int>(threadIdx.x);
  Sums<T> sums = sum_and_hold<T, kPacked>(a, held, [&] {
    if (me == 0) sample = sample_of(a, b);
  });
  cudaTriggerProgrammaticLaunchCompletion();
  sums = warp_total(sums);
  if (me % 32 == 0) warps[me / 32] = sums;
  cluster.sync();
  if (me < 32) {
    const int of_block = static_cast<int>(blockDim.x) / 32;
    Sums<double> total{};
    for (int i = me; i < ranks * of_block; i += 32)
      total.add(*cluster.map_shared_rank(warps + i % of_block, i / of_block));
    total = warp_total(total);
    if (me == 0) coefficients = finish_sample<T, false>(a, b, sample, total, rank == 0);
  }
  __syncthreads();
  // A block must not end, and its shared memory with it, while others read its sums. Nothing is handed over by it, so
  // that the gradient need not wait until all that was written is seen by everyone.
  __cluster_barrier_arrive_relaxed();
  store_held_gradient<T, kPacked>(a, held, coefficients);
  cluster.barrier_wait();
#endif
}

// Bytes of each input of the next sample that a block has brought into the second-level cache while it waits: memory is
// busy meanwhile, and all blocks' together stay there until they are read.
constexpr int64_t kAhead = 16 << 10;

template <typename T, bool kPacked>
__device__ void bring_near(const LossArgs& a, const Held& next) {
  const View views[] = {a.v_theta, a.v_old, a.x_t, a.x0, a.v_ref};
  const int me = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (!kPacked || me != 32 * i || next.count <= 0 || (i == 4 && !a.has_ref)) continue;
    const int size = item_size(views[i].dtype);
    const int64_t bytes = int64_t(next.count) * kPack<T> * size;
    prefetch(sample_start(views[i], next.b) + next.place<T>(a, 0).first * size, bytes < kAhead ? bytes : kAhead);
  }
}

// One sample after the other, each by all blocks, which are on the device together and wait for each other's sums.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPacked ? 2 : 1)
    loss_on_device(const __grid_constant__ LossArgs a, const __grid_constant__ Slices slices, Sums<double>* partial) {
  extern __shared__ uint4 words[];
  __shared__ Sums<T> warps[kWarps];
  __shared__ Sums<double> wide[kWarps];
  __shared__ Coefficients coefficients;
  const auto grid = cooperative_groups::this_grid();
  Held held = held_of(0, slices, blockIdx.x, words);
  for (; held.b < a.batch; ++held.b) {
    // Two sets, as other blocks may still read those of the sample before.
    Sums<double>* parts = partial + (held.b & 1) * gridDim.x;
    const Sums<double> mine = block_total(sum_and_hold<T, kPacked>(a, held, [] {}), warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = mine;
    auto arrival = grid.barrier_arrive();
    Held next = held;
    if (++next.b < a.batch) bring_near<T, kPacked>(a, next);
    grid.barrier_wait(std::move(arrival));
    Sums<double> part{};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) part.add(parts[i]);
    const Sums<double> total = block_total(part, wide);
    if (threadIdx.x == 0)
      coefficients = finish_sample<T, false>(a, held.b, sample_of(a, held.b), total, blockIdx.x == 0);
    __syncthreads();
    store_held_gradient<T, kPacked>(a, held, coefficients);
  }
  // It wrote the details itself.
  if (blockIdx.x == 0) add_losses<T>(a);
}

// The scalar loss after ``loss_in_clusters``, by one block that is there already when that is done.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_losses(const __grid_constant__ LossArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  add_losses<T>(a);
}

// Where sample b is and how it is cut, into at most `slices.splits`: only the device knows how long a segment is.
template <typename T, bool kGeneral>
__device__ Part part_and_slices(const LossArgs& a, int64_t b, const Slices& slices, Slices& mine) {
  mine = slices;
  if constexpr (kGeneral) {
    const Part part = part_of(a, b);
    if (a.offsets) mine = slices_of(a.batch, packs_of<T>(part.length));
    return part;
  }
  return {b, 0, a.elements};
}

// First of two launches: the sums of every slice.
template <typename T, bool kPacked, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kPacked && !kGeneral ? 2 : 1)
    slice_sums(const __grid_constant__ LossArgs a, const __grid_constant__ Slices slices,
               SumsOf<double, kGeneral>* partial, unsigned long long* finished) {
  __shared__ SumsOf<T, kGeneral> warps[kWarps];
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;  // the second launch counts
  for (int64_t item = blockIdx.x; item < a.batch * slices.splits; item += gridDim.x) {
    const int64_t b = item / slices.splits, split = item % slices.splits;
    Slices mine;
    const Part part = part_and_slices<T, kGeneral>(a, b, slices, mine);
    if (kGeneral && split >= mine.splits) continue;
    const Affine<T> f = affine_of<T>(a, b);
    SumsOf<T, kGeneral> sums{};
    for (int64_t pack = mine.first(split) + threadIdx.x; pack < mine.last(split); pack += blockDim.x)
      load_errors<T, kPacked, kGeneral>(a, b, place_of<T>(part, pack), [&] { return f; }, sums);
    const SumsOf<double, kGeneral> total = block_total(sums, warps);
    if (threadIdx.x == 0) partial[item] = total;
  }
}

// Second of two launches: every block adds up its sample's slices, which takes less than to wait for another to do it.
// Backwards, as what the first launch read last may still be in cache.
template <typename T, bool kPacked, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kPacked && !kGeneral ? 2 : 1)
    slice_gradients(const __grid_constant__ LossArgs a, const __grid_constant__ Slices slices,
                    const SumsOf<double, kGeneral>* partial, unsigned long long* finished) {
  __shared__ Coefficients coefficients;
  for (int64_t item = a.batch * slices.splits - 1 - blockIdx.x; item >= 0; item -= gridDim.x) {
    const int64_t b = item / slices.splits, split = item % slices.splits;
    Slices mine;
    const Part part = part_and_slices<T, kGeneral>(a, b, slices, mine);
    if (split > 0 && (!a.want_grad || (kGeneral && split >= mine.splits))) continue;
    __syncthreads();  // the last item's coefficients may still be in use
    if (threadIdx.x < 32) {
      SumsOf<double, kGeneral> sums{};
      for (int64_t i = threadIdx.x; i < mine.splits; i += 32) sums.add(partial[b * slices.splits + i]);
      sums = warp_total(sums);
      if (threadIdx.x == 0) coefficients = finish_sample<T, kGeneral>(a, b, sample_of(a, b), sums, split == 0);
    }
    __syncthreads();
    if (a.want_grad) {
      const Coefficients c = coefficients;
      const Affine<T> f = affine_of<T>(a, b);
      for (int64_t pack = mine.first(split) + threadIdx.x; pack < mine.last(split); pack += blockDim.x) {
        const Place place = place_of<T>(part, pack);
        SumsOf<T, kGeneral> unused{};
        const Errors<T> e = load_errors<T, kPacked, kGeneral>(a, b, place, [&] { return f; }, unused);
        store_gradient<T, kPacked, kGeneral>(a, place, e, c);
      }
    }
    if (split == 0) count_sample<T>(a, finished);
  }
}

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPacked ? 2 : 1)
    scale_kernel(const __grid_constant__ ScaleArgs a, const __grid_constant__ Slices slices) {
  const T factor = *static_cast<const T*>(a.factor);
  if (factor == 1) return;
  for (int64_t item = blockIdx.x; item < a.batch * slices.splits; item += gridDim.x) {
    const int64_t b = item / slices.splits, split = item % slices.splits;
    for (int64_t pack = slices.first(split) + threadIdx.x; pack < slices.last(split); pack += blockDim.x) {
      const Place place{b, pack * kPack<T>, a.elements};
      Pack<T> x = load<T, kPacked>(a.tensor, place);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) x.v[j] *= factor;
      store<T, kPacked>(a.tensor, place, x);
    }
  }
}

// What a device allows the cluster kernel: blocks per cluster (0: no clusters), blocks that share a processor as far as
// registers go, dynamic shared memory per block.
struct ClusterLimits {
  int blocks = 0, together = 1;
  int64_t shared_bytes = 0;
};

// Clusters that run at once, 0 where such ones cannot.
template <typename Kernel>
int active_clusters(Kernel kernel, const Shape& shape) {
  int clusters = 0;
  Shape one = shape;
  one.blocks = shape.cluster;
  const Configuration configuration(one, nullptr);
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config) == cudaSuccess) return clusters;
  cudaGetLastError();  // a refusal is an answer, not an error
  return 0;
}

template <typename Kernel>
ClusterLimits ask_cluster_limits(Kernel kernel, int device) {
  ClusterLimits limits;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  // The image that was loaded may be older than the device.
  if (attributes.ptxVersion < 90) return limits;
  int shared_bytes = 0;
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits.shared_bytes = shared_bytes - static_cast<int64_t>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limits.shared_bytes)));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&limits.together, kernel, kThreads, 0));
  limits.together = std::max(limits.together, 1);
  // More than 8 blocks is not portable: not every device, nor every part of one, has room for them.
  const bool large = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  cudaGetLastError();
  for (int blocks = large ? 16 : 8; blocks > 0 && limits.blocks == 0; blocks /= 2) {
    if (active_clusters(kernel, {blocks, kThreads, blocks, static_cast<size_t>(limits.shared_bytes)}) > 0)
      limits.blocks = blocks;
  }
  return limits;
}

// How to launch the cluster kernel for samples of so many packs, that take so many bytes; no blocks where it cannot hold
// one.
template <typename Kernel>
Shape ask_cluster_shape(Kernel kernel, int64_t batch, int64_t packs, int64_t bytes_of_pack,
                        const ClusterLimits& limits) {
  Shape shape{};
  for (int blocks = 1; blocks <= limits.blocks; blocks *= 2) {
    const int64_t length = (packs + blocks - 1) / blocks, bytes = length * bytes_of_pack;
    if (bytes > limits.shared_bytes || batch > 0x7fffffff / blocks) continue;
    const Shape larger{batch * blocks, threads_for(length), blocks, static_cast<size_t>(bytes)};
    // A larger cluster reads a sample sooner, but its blocks wait for each other where not all clusters run at once.
    const bool enough = static_cast<int64_t>(shape.shared_bytes) <= limits.shared_bytes / limits.together;
    if (shape.blocks > 0 && enough && active_clusters(kernel, larger) < batch) break;
    shape = larger;
    if (length <= kThreads) break;
  }
  return shape;
}

// The same for the kernel on the whole device, as one block for every processor or two. Where threads have fewer than
// two packs, two launches wait less for each other.
template <typename Kernel>
Shape ask_device_shape(Kernel kernel, int device, int64_t packs, int64_t bytes_of_pack) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  if (!attribute(cudaDevAttrCooperativeLaunch)) return {};
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  const int64_t shared_bytes =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  for (int together = 2; together > 0; --together) {
    const int64_t blocks = std::min<int64_t>(together * attribute(cudaDevAttrMultiProcessorCount), kBlocks);
    const int64_t length = (packs + blocks - 1) / blocks, bytes = length * bytes_of_pack;
    int fit = 0;
    if (length < 2 * kThreads) break;
    if (bytes > shared_bytes) continue;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, static_cast<size_t>(bytes)));
    if (fit < together) continue;
    Shape shape{blocks, kThreads, 0, static_cast<size_t>(bytes)};
    shape.together = true;
    return shape;
  }
  return {};
}

// An answer of CUDA's, which takes longer than the kernel runs: every caller asks once for a key.
template <typename Key, typename Ask>
auto remember(const Key& key, const Ask& ask) {
  static std::mutex mutex;
  static std::map<Key, decltype(ask())> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = answers.find(key);
  return found != answers.end() ? found->second : answers[key] = ask();
}

template <typename Kernel>
Shape cluster_shape(Kernel kernel, int device, int64_t batch, int64_t packs, int64_t bytes_of_pack) {
  return remember(std::make_tuple(device, kernel, batch, packs, bytes_of_pack), [&] {
    const ClusterLimits limits =
        remember(std::make_tuple(device, kernel), [&] { return ask_cluster_limits(kernel, device); });
    return ask_cluster_shape(kernel, batch, packs, bytes_of_pack, limits);
  });
}

template <typename Kernel>
Shape device_shape(Kernel kernel, int device, int64_t packs, int64_t bytes_of_pack) {
  return remember(std::make_tuple(device, kernel, packs, bytes_of_pack),
                  [&] { return ask_device_shape(kernel, device, packs, bytes_of_pack); });
}

template <typename T, bool kPacked, bool kGeneral>
void loss_in_slices(const LossArgs& a, const Queue& queue, const Slices& slices) {
  auto* finished = static_cast<unsigned long long*>(queue.workspace);
  auto* partial = reinterpret_cast<SumsOf<double, kGeneral>*>(finished + 1);
  launch(slice_sums<T, kPacked, kGeneral>, shape_of(a.batch, slices), queue, a, slices, partial, finished);
  launch(slice_gradients<T, kPacked, kGeneral>, shape_of(a.batch, slices), queue, a, slices, partial, finished);
}

}  // namespace

// For two launches or for two sets of sums of all blocks.
size_t workspace_size(int64_t batch) {
  return sizeof(unsigned long long) + static_cast<size_t>(batch + 2 * kBlocks) * sizeof(WeightedSums<double>);
}

void nft_loss(const LossArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const std::vector<const View*> views{&a.v_theta, &a.v_old, &a.x_t, &a.x0, &a.v_ref, &a.grad};
  // Segments start at whole rows of `elements`, so that their packs are aligned where those of a row are.
  choose_variant(a.double_math, a.offsets ? 1 : a.batch, a.elements, views, [&](auto zero, auto is_packed) {
    using T = decltype(zero);
    constexpr bool kPacked = is_packed.value;
    const int64_t packs = packs_of<T>(a.elements);
    const Slices slices = slices_of(a.batch, packs);
    if (a.offsets || elementwise(a)) {
      const Slices most{packs, most_splits(a.batch), kThreads};
      return loss_in_slices<T, kPacked, true>(a, queue, a.offsets ? most : slices);
    }
    const int64_t bytes_of_pack = 32 * (with_kl(a) ? 3 : 2);
    const auto in_clusters = loss_in_clusters<T, kPacked>;
    Shape clusters = cluster_shape(in_clusters, queue.device, a.batch, packs, bytes_of_pack);
    if (clusters.blocks == 0) {
      const auto on_device = loss_on_device<T, kPacked>;
      const Shape whole = device_shape(on_device, queue.device, packs, bytes_of_pack);
      if (whole.blocks == 0) return loss_in_slices<T, kPacked, false>(a, queue, slices);
      const Slices each{packs, whole.blocks, (packs + whole.blocks - 1) / whole.blocks};
      return launch(on_device, whole, queue, a, each, static_cast<Sums<double>*>(queue.workspace));
    }
    // Without a gradient nothing is held.
    if (!a.want_grad) clusters.shared_bytes = 0;
    launch(in_clusters, clusters, queue, a, packs);
    Shape last{1, threads_for(a.batch)};
    last.early = true;
    launch(sum_losses<T>, last, queue, a);
  });
}

void scale(const ScaleArgs& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  choose_variant(a.double_math, a.batch, a.elements, {&a.tensor}, [&](auto zero, auto is_packed) {
    using T = decltype(zero);
    const Slices slices = slices_of(a.batch, packs_of<T>(a.elements));
    launch(scale_kernel<T, is_packed.value>, shape_of(a.batch, slices), queue, a, slices);
  });
}

}  // namespace cuda
}  // namespace nft

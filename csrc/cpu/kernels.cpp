// The loss and the forward process on the CPU, compiled once per instruction set (NFT_ISA names the namespace).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

constexpr int64_t kSamplesPerThread = 4;

template <typename T>
struct Buffers {
  alignas(64) T v_theta[kChunk], v_old[kChunk], x_t[kChunk], x0[kChunk], v_ref[kChunk], grad[kChunk];
  alignas(64) T mask[kChunk], r[kChunk];
};

Sample sample_of(const LossArgs& a, int64_t b) {
  return {value(a.t, b), a.r_per_element ? 0.0 : value(a.r, b), value(a.beta, b),
          a.outer.data ? value(a.outer, b) : 1.0 / static_cast<double>(a.batch)};
}

// The tensors in a chunk of sample b, kept as S; mask and r only where elements do not count alike.
template <typename T, typename S>
struct Chunk {
  const S *v_theta, *v_old, *x_t, *x0;
  const T *mask, *r;
  Affine<T> f;
};

template <typename T, typename S, bool kElementwise>
Chunk<T, S> load_chunk(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count, Buffers<T>& buf) {
  const Sample sample = sample_of(a, b);
  Chunk<T, S> c{source<T, S>(a.v_theta, row, start, count, buf.v_theta),
                source<T, S>(a.v_old, row, start, count, buf.v_old),
                source<T, S>(a.x_t, row, start, count, buf.x_t),
                source<T, S>(a.x0, row, start, count, buf.x0),
                nullptr,
                nullptr,
                affine<T>(a.prediction, sample.t, sample.beta)};
  if constexpr (kElementwise) {
    c.mask = load_or(a.has_mask, a.mask, row, start, count, T(1), buf.mask);
    c.r = load_or(a.r_per_element, a.r_elements, row, start, count, static_cast<T>(sample.r), buf.r);
  }
  return c;
}

template <typename T, typename S, bool kElementwise>
WeightedSums<double> chunk_sums(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count,
                                Buffers<T>& buf) {
  const Chunk<T, S> in = load_chunk<T, S, kElementwise>(a, b, row, start, count, buf);
  T pa[kLanes] = {0}, na[kLanes] = {0}, ps[kLanes] = {0}, ns[kLanes] = {0}, da[kLanes] = {0}, dm[kLanes] = {0};
  T size[kLanes] = {0}, pr[kLanes] = {0}, nr[kLanes] = {0};
  auto one = [&](int64_t k, int l) {
    T d, positive, negative, m = 1;
    errors<T>(get(in.v_theta[k]), get(in.v_old[k]), get(in.x_t[k]), get(in.x0[k]), in.f, d, positive, negative);
    if constexpr (kElementwise) {
      m = in.mask[k];
      d = m > 0 ? d : 0;
      positive = m > 0 ? positive : 0;
      negative = m > 0 ? negative : 0;
      size[l] += m;
      pr[l] += m * (in.r[k] * (positive * positive));
      nr[l] += m * ((1 - in.r[k]) * (negative * negative));
    }
    const T magnitude = std::abs(d);
    pa[l] += m * std::abs(positive);
    na[l] += m * std::abs(negative);
    ps[l] += m * (positive * positive);
    ns[l] += m * (negative * negative);
    da[l] += m * magnitude;
    dm[l] = dm[l] > magnitude ? dm[l] : magnitude;
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) one(k + l, l);
  }
  for (int l = 0; k < count; ++k, ++l) one(k, l);
  WeightedSums<double> sums{};
  sums.all.positive_abs = total(pa);
  sums.all.negative_abs = total(na);
  sums.all.positive_sq = total(ps);
  sums.all.negative_sq = total(ns);
  sums.all.d_abs = total(da);
  for (int l = 0; l < kLanes; ++l) sums.all.d_max = std::max(sums.all.d_max, static_cast<double>(dm[l]));
  if (std::isnan(sums.all.d_abs)) sums.all.d_max = sums.all.d_abs;
  if constexpr (kElementwise) {
    sums.size = total(size);
    sums.positive = total(pr);
    sums.negative = total(nr);
  }
  if (a.has_ref) {
    const S* v_ref = source<T, S>(a.v_ref, row, start, count, buf.v_ref);
    T kl[kLanes] = {0};
    auto add = [&](int64_t k, int l) {
      T delta = get(in.v_theta[k]) - get(v_ref[k]), m = 1;
      if constexpr (kElementwise) {
        m = in.mask[k];
        delta = m > 0 ? delta : 0;
      }
      kl[l] += m * (delta * delta);
    };
    for (k = 0; k + kLanes <= count; k += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) add(k + l, l);
    }
    for (int l = 0; k < count; ++k, ++l) add(k, l);
    sums.all.kl = total(kl);
  }
  return sums;
}

template <typename T>
Coefficients finish_sample(const LossArgs& a, int64_t b, const WeightedSums<double>& sums) {
  double details[kDetails];
  const Sample sample = sample_of(a, b);
  const Coefficients c = elementwise(a) ? finish(a, sample, sums, details)
                                        : finish(a, sample, sums.all, part_of(a, b).length, details);
  for (int i = 0; i < kDetails; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(details[i]);
  return c;
}

template <typename T, typename S, bool kElementwise>
void chunk_grad(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count, const Coefficients& c,
                Buffers<T>& buf) {
  const Chunk<T, S> in = load_chunk<T, S, kElementwise>(a, b, row, start, count, buf);
  const T positive_factor = static_cast<T>(c.positive), negative_factor = static_cast<T>(c.negative);
  T* grad = place(a.grad, row, start, buf.grad);
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    T d, positive, negative;
    errors<T>(get(in.v_theta[k]), get(in.v_old[k]), get(in.x_t[k]), get(in.x0[k]), in.f, d, positive, negative);
    if constexpr (kElementwise) {
      const T value = policy_gradient(c, in.r[k], positive, negative);
      grad[k] = in.mask[k] > 0 ? in.mask[k] * value : 0;
    } else {
      grad[k] = positive_factor * positive + negative_factor * negative;
    }
  }
  if (a.has_ref && a.kl_weight > 0) {
    const S* v_ref = source<T, S>(a.v_ref, row, start, count, buf.v_ref);
    const T factor = static_cast<T>(c.kl);
    for (int64_t k = 0; k < count; ++k) {
      const T value = factor * (get(in.v_theta[k]) - get(v_ref[k]));
      if constexpr (kElementwise)
        grad[k] += in.mask[k] > 0 ? in.mask[k] * value : 0;
      else
        grad[k] += value;
    }
  }
  if (grad == buf.grad) store(a.grad, row, start, count, grad);
}

template <typename T>
void reduce(const LossArgs& a) {
  const T *policy = static_cast<const T*>(a.details), *kl = policy + 5 * a.batch;
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    sum += (static_cast<double>(policy[b]) + a.kl_weight * static_cast<double>(kl[b])) *
           (a.outer.data ? value(a.outer, b) : 1.0);
  *static_cast<T*>(a.loss) = static_cast<T>(a.outer.data ? sum : sum / static_cast<double>(a.batch));
}

// A sample's gradient is written in the same visit that sums its errors, while it is still in cache. Either every thread
// has samples of its own, or, where there are too few, all threads share one sample at a time; the bits are the same.
template <typename T, typename S, bool kElementwise>
void loss(const LossArgs& a) {
  auto chunks_of = [](const Part& part) { return (part.length + kChunk - 1) / kChunk; };
  auto length = [](const Part& part, int64_t c) { return std::min(kChunk, part.length - c * kChunk); };
  int64_t most = 0;
  for (int64_t b = 0; b < (a.offsets ? a.batch : 1); ++b) most = std::max(most, chunks_of(part_of(a, b)));
  if (most == 1 || a.batch >= kSamplesPerThread * omp_get_max_threads()) {
#pragma omp parallel
    {
      Buffers<T> buf;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.batch; ++b) {
        const Part p = part_of(a, b);
        WeightedSums<double> sums{};
        for (int64_t c = 0; c < chunks_of(p); ++c)
          sums.add(chunk_sums<T, S, kElementwise>(a, b, p.row, p.start + c * kChunk, length(p, c), buf));
        const Coefficients coefficients = finish_sample<T>(a, b, sums);
        for (int64_t c = 0; a.want_grad && c < chunks_of(p); ++c)
          chunk_grad<T, S, kElementwise>(a, b, p.row, p.start + c * kChunk, length(p, c), coefficients, buf);
      }
    }
    return reduce<T>(a);
  }
  // Two sets, so that a thread may start the next sample while another still adds up this one.
  std::vector<WeightedSums<double>> partial(2 * most);
#pragma omp parallel
  {
    Buffers<T> buf;
    for (int64_t b = 0; b < a.batch; ++b) {
      WeightedSums<double>* mine = partial.data() + (b & 1) * most;
      const Part p = part_of(a, b);
      const int64_t chunks = chunks_of(p);
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks; ++c)
        mine[c] = chunk_sums<T, S, kElementwise>(a, b, p.row, p.start + c * kChunk, length(p, c), buf);
      Coefficients coefficients{};
#pragma omp single copyprivate(coefficients)
      {
        WeightedSums<double> sums{};
        for (int64_t c = 0; c < chunks; ++c) sums.add(mine[c]);
        coefficients = finish_sample<T>(a, b, sums);
      }
      if (a.want_grad) {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < chunks; ++c)
          chunk_grad<T, S, kElementwise>(a, b, p.row, p.start + c * kChunk, length(p, c), coefficients, buf);
      }
    }
  }
  reduce<T>(a);
}

template <typename T>
void noise(const NoiseArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
#pragma omp parallel
  {
    Buffers<T> buf;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * chunks; ++item) {
      const int64_t b = item / chunks, start = item % chunks * kChunk, count = std::min(kChunk, a.elements - start);
      const T* x0 = load(a.x0, b, start, count, buf.x0);
      const T* eps = buf.v_ref;
      if (a.has_noise) {
        eps = load(a.noise, b, start, count, buf.v_ref);
      } else {
        draw(a.seed[b], a.sample[b], start, count, buf.v_ref);
      }
      const T t = static_cast<T>(value(a.t, b)), keep = static_cast<T>(1 - value(a.t, b));
      for (int64_t k = 0; k < count; ++k) buf.grad[k] = keep * x0[k] + t * eps[k];
      store(a.out, b, start, count, buf.grad);
      if (a.want_wide) store(a.wide, b, start, count, buf.grad);
    }
  }
}

// Whether the tensors can be read, and the gradient written, without buffers.
bool all_bf16(const LossArgs& a) {
  return plain_bf16(a.v_theta) && plain_bf16(a.v_old) && plain_bf16(a.x_t) && plain_bf16(a.x0) &&
         (!a.has_ref || plain_bf16(a.v_ref)) && (!a.want_grad || plain_bf16(a.grad));
}

}  // namespace

void nft_loss(const LossArgs& args) {
  if (args.want_grad) expect_writes(args.grad, args.batch, args.elements);
  if (elementwise(args))
    args.double_math ? loss<double, double, true>(args) : loss<float, float, true>(args);
  else if (args.double_math)
    loss<double, double, false>(args);
  else if (all_bf16(args))
    loss<float, uint16_t, false>(args);
  else
    loss<float, float, false>(args);
}

void add_noise(const NoiseArgs& args) {
  expect_writes(args.out, args.batch, args.elements);
  args.double_math ? noise<double>(args) : noise<float>(args);
}

}  // namespace NFT_ISA
}  // namespace nft

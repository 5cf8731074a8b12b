// The loss and the forward process on the CPU, compiled once per instruction set (NFT_ISA names the namespace).
#include <algorithm>
#include <cmath>
#include <vector>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

template <typename T>
struct Buffers {
  alignas(64) T v_theta[kChunk], v_old[kChunk], x_t[kChunk], x0[kChunk], v_ref[kChunk], grad[kChunk];
};

template <typename T>
Sums<double> chunk_sums(const LossArgs& a, int64_t b, int64_t start, int64_t count, Buffers<T>& buf) {
  const T* v_theta = load(a.v_theta, b, start, count, buf.v_theta);
  const T* v_old = load(a.v_old, b, start, count, buf.v_old);
  const T* x_t = load(a.x_t, b, start, count, buf.x_t);
  const T* x0 = load(a.x0, b, start, count, buf.x0);
  const T t = static_cast<T>(value(a.t, b)), t_beta = static_cast<T>(value(a.t, b) * value(a.beta, b));
  T pa[kLanes] = {0}, na[kLanes] = {0}, ps[kLanes] = {0}, ns[kLanes] = {0}, da[kLanes] = {0}, dm[kLanes] = {0};
  auto one = [&](int64_t k, int l) {
    T d, positive, negative;
    errors(v_theta[k], v_old[k], x_t[k], x0[k], t, t_beta, d, positive, negative);
    const T magnitude = std::abs(d);
    pa[l] += std::abs(positive);
    na[l] += std::abs(negative);
    ps[l] += positive * positive;
    ns[l] += negative * negative;
    da[l] += magnitude;
    dm[l] = dm[l] > magnitude ? dm[l] : magnitude;
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) one(k + l, l);
  }
  for (int l = 0; k < count; ++k, ++l) one(k, l);
  Sums<double> sums{};
  sums.positive_abs = total(pa);
  sums.negative_abs = total(na);
  sums.positive_sq = total(ps);
  sums.negative_sq = total(ns);
  sums.d_abs = total(da);
  for (int l = 0; l < kLanes; ++l) sums.d_max = std::max(sums.d_max, static_cast<double>(dm[l]));
  if (std::isnan(sums.d_abs)) sums.d_max = sums.d_abs;
  if (a.has_ref) {
    const T* v_ref = load(a.v_ref, b, start, count, buf.v_ref);
    T kl[kLanes] = {0};
    for (k = 0; k + kLanes <= count; k += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const T delta = v_theta[k + l] - v_ref[k + l];
        kl[l] += delta * delta;
      }
    }
    for (int l = 0; k < count; ++k, ++l) kl[l] += (v_theta[k] - v_ref[k]) * (v_theta[k] - v_ref[k]);
    sums.kl = total(kl);
  }
  return sums;
}

template <typename T>
Coefficients finish_sample(const LossArgs& a, int64_t b, const Sums<double>& sums) {
  const double grad_loss = a.grad_loss ? static_cast<double>(*static_cast<const T*>(a.grad_loss)) : 1.0;
  double details[kDetails];
  const Coefficients c = finish(a, value(a.t, b), value(a.r, b), value(a.beta, b), grad_loss, sums, details);
  for (int i = 0; i < kDetails; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(details[i]);
  return c;
}

template <typename T>
void chunk_grad(const LossArgs& a, int64_t b, int64_t start, int64_t count, const Coefficients& c, Buffers<T>& buf) {
  const T* v_theta = load(a.v_theta, b, start, count, buf.v_theta);
  const T* v_old = load(a.v_old, b, start, count, buf.v_old);
  const T* x_t = load(a.x_t, b, start, count, buf.x_t);
  const T* x0 = load(a.x0, b, start, count, buf.x0);
  const T t = static_cast<T>(value(a.t, b)), t_beta = static_cast<T>(value(a.t, b) * value(a.beta, b));
  const T positive_factor = static_cast<T>(c.positive), negative_factor = static_cast<T>(c.negative);
  const bool direct = dense(a.grad) && a.grad.dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64);
  T* grad = direct ? reinterpret_cast<T*>(sample_start(a.grad, b)) + start : buf.grad;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    T d, positive, negative;
    errors(v_theta[k], v_old[k], x_t[k], x0[k], t, t_beta, d, positive, negative);
    grad[k] = positive_factor * positive + negative_factor * negative;
  }
  if (a.has_ref && a.kl_weight > 0) {
    const T* v_ref = load(a.v_ref, b, start, count, buf.v_ref);
    const T factor = static_cast<T>(c.kl);
    for (int64_t k = 0; k < count; ++k) grad[k] += factor * (v_theta[k] - v_ref[k]);
  }
  if (!direct) store(a.grad, b, start, count, grad);
}

template <typename T>
void reduce(const LossArgs& a) {
  const T *policy = static_cast<const T*>(a.details), *kl = policy + 5 * a.batch;
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b) sum += static_cast<double>(policy[b]) + a.kl_weight * static_cast<double>(kl[b]);
  *static_cast<T*>(a.loss) = static_cast<T>(sum / static_cast<double>(a.batch));
}

// All threads share one sample, so that it is still in cache when its gradient is written in the same visit.
template <typename T>
void loss(const LossArgs& a) {
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
  auto length = [&](int64_t c) { return std::min(kChunk, a.elements - c * kChunk); };
  if (chunks == 1) {
#pragma omp parallel
    {
      Buffers<T> buf;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.batch; ++b) {
        const Coefficients c = finish_sample<T>(a, b, chunk_sums<T>(a, b, 0, a.elements, buf));
        if (a.want_grad) chunk_grad<T>(a, b, 0, a.elements, c, buf);
      }
    }
    return reduce<T>(a);
  }
  // Two sets, so that a thread may start the next sample while another still adds up this one.
  std::vector<Sums<double>> partial(2 * chunks);
#pragma omp parallel
  {
    Buffers<T> buf;
    for (int64_t b = 0; b < a.batch; ++b) {
      Sums<double>* mine = partial.data() + (b & 1) * chunks;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks; ++c) mine[c] = chunk_sums<T>(a, b, c * kChunk, length(c), buf);
      Coefficients coefficients{};
#pragma omp single copyprivate(coefficients)
      {
        Sums<double> sums{};
        for (int64_t c = 0; c < chunks; ++c) sums.add(mine[c]);
        coefficients = finish_sample<T>(a, b, sums);
      }
      if (a.want_grad) {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < chunks; ++c)
          chunk_grad<T>(a, b, c * kChunk, length(c), coefficients, buf);
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
    }
  }
}

}  // namespace

void nft_loss(const LossArgs& args) { args.double_math ? loss<double>(args) : loss<float>(args); }

void add_noise(const NoiseArgs& args) { args.double_math ? noise<double>(args) : noise<float>(args); }

}  // namespace NFT_ISA
}  // namespace nft

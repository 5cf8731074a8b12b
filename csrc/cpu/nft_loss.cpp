// The loss and its gradient on the CPU, compiled once per instruction set (NFT_ISA names the namespace).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

constexpr int64_t kSamplesPerThread = 4;
// Elements after which sums go on in double: many equal terms would otherwise all round to the same side.
constexpr int64_t kFold = 512;

// Errors that one weight is the mean of, up to which it nearly cancels with each of them in the gradient: that is lost if
// the errors are taken apart again.
constexpr int64_t kFew = 8;

enum Term { kPositiveAbs, kNegativeAbs, kPositiveSq, kNegativeSq, kDAbs, kKl, kSize, kPositive, kNegative, kTerms };

template <typename T>
struct Buffers {
  alignas(64) T v_theta[kChunk], v_old[kChunk], x_t[kChunk], x0[kChunk], v_ref[kChunk], grad[kChunk];
  alignas(64) T mask[kChunk], r[kChunk], of_policy[kChunk];
};

Sample sample_of(const LossArgs& a, int64_t b) {
  return {unit(value(a.t, b)), a.r_per_element ? 0.0 : unit(value(a.r, b)), value(a.beta, b), value(a.loss_weight, b)};
}

// The tensors in a chunk of sample b, kept as S; only where elements do not count alike the mask, what they count in the
// policy loss, and r.
template <typename T, typename S>
struct Chunk {
  const S *v_theta, *v_old, *x_t, *x0, *v_ref;
  const T *mask, *of_policy, *r;
  Affine<T> f;
};

template <typename T, typename S, bool kElementwise, bool kRef>
Chunk<T, S> load_chunk(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count, Buffers<T>& buf) {
  const Sample sample = sample_of(a, b);
  Chunk<T, S> c{source<T, S>(a.v_theta, row, start, count, buf.v_theta),
                source<T, S>(a.v_old, row, start, count, buf.v_old),
                source<T, S>(a.x_t, row, start, count, buf.x_t),
                source<T, S>(a.x0, row, start, count, buf.x0),
                kRef ? source<T, S>(a.v_ref, row, start, count, buf.v_ref) : nullptr,
                nullptr,
                nullptr,
                nullptr,
                affine<T>(a.prediction, sample.t, sample.beta)};
  if constexpr (kElementwise) {
    c.mask = c.of_policy = load_or(a.has_mask, a.mask, row, start, count, T(1), buf.mask);
    if (a.has_policy_weight) {
      const T* weight = load(a.policy_weight, row, start, count, buf.of_policy);
      for (int64_t k = 0; k < count; ++k) buf.of_policy[k] = c.mask[k] * weight[k];
      c.of_policy = buf.of_policy;
    }
    c.r = load_or(a.r_per_element, a.r_elements, row, start, count, static_cast<T>(sample.r), buf.r);
  }
  return c;
}

template <typename T, typename S, bool kElementwise, bool kRef>
WeightedSums<double> chunk_sums(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count,
                                Buffers<T>& buf) {
  const Chunk<T, S> in = load_chunk<T, S, kElementwise, kRef>(a, b, row, start, count, buf);
  auto terms = [&](int64_t k, T v_theta, T v_old, T x_t, T x0, T v_ref) {
    T d, base, m = 1, of_policy = 1, r = 0;
    errors<T>(v_theta, v_old, x_t, x0, in.f, d, base);
    T positive = fused(in.f.step, d, base), negative = fused(-in.f.step, d, base), delta = v_theta - v_ref;
    if constexpr (kElementwise) {
      m = in.mask[k], of_policy = in.of_policy[k], r = in.r[k];
      d = m > 0 ? d : 0;
      positive = m > 0 ? positive : 0;
      negative = m > 0 ? negative : 0;
      delta = m > 0 ? delta : 0;
    }
    return WeightedSums<T>{
        {m * std::abs(positive), m * std::abs(negative), m * (positive * positive), m * (negative * negative),
         m * (delta * delta), m * std::abs(d), std::abs(d)},
        m, of_policy * (r * (positive * positive)), of_policy * ((1 - r) * (negative * negative))};
  };
  // Of a short sample, setting up and adding up the others would be much of the time.
  constexpr int kUsed = kElementwise ? kTerms : kRef ? kKl + 1 : kKl;
  double sums[kUsed][kLanes] = {{0}};
  T d_max[kLanes] = {0};
  for (int64_t k = 0; k < count;) {
    T lane[kUsed][kLanes] = {{0}};
    auto add = [&](int l, const WeightedSums<T>& one, const WeightedSums<T>& two) {
      lane[kPositiveAbs][l] += one.all.positive_abs + two.all.positive_abs;
      lane[kNegativeAbs][l] += one.all.negative_abs + two.all.negative_abs;
      lane[kPositiveSq][l] += one.all.positive_sq + two.all.positive_sq;
      lane[kNegativeSq][l] += one.all.negative_sq + two.all.negative_sq;
      lane[kDAbs][l] += one.all.d_abs + two.all.d_abs;
      if constexpr (kRef) lane[kKl][l] += one.all.kl + two.all.kl;
      if constexpr (kElementwise) {
        lane[kSize][l] += one.size + two.size;
        lane[kPositive][l] += one.positive + two.positive;
        lane[kNegative][l] += one.negative + two.negative;
      }
      const T most = one.all.d_max > two.all.d_max ? one.all.d_max : two.all.d_max;
      d_max[l] = d_max[l] > most ? d_max[l] : most;
    };
    for (const int64_t stop = std::min(count, k + kFold); k + 2 * kLanes <= stop; k += 2 * kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        auto half = [&](int i) {
          auto at = [&](const S* data) { return part(data + k, l, i); };
          return terms(k + place_of<S>(l, i), at(in.v_theta), at(in.v_old), at(in.x_t), at(in.x0),
                       kRef ? at(in.v_ref) : T(0));
        };
        add(l, half(0), half(1));
      }
    }
    if (count - k < 2 * kLanes)
      for (int l = 0; k < count; ++k, l = (l + 1) % kLanes)
        add(l, terms(k, get(in.v_theta[k]), get(in.v_old[k]), get(in.x_t[k]), get(in.x0[k]),
                     kRef ? get(in.v_ref[k]) : T(0)), {});
    for (int term = 0; term < kUsed; ++term)
      for (int l = 0; l < kLanes; ++l) sums[term][l] += static_cast<double>(lane[term][l]);
  }
  WeightedSums<double> result{};
  result.all.positive_abs = total(sums[kPositiveAbs]);
  result.all.negative_abs = total(sums[kNegativeAbs]);
  result.all.positive_sq = total(sums[kPositiveSq]);
  result.all.negative_sq = total(sums[kNegativeSq]);
  result.all.d_abs = total(sums[kDAbs]);
  if constexpr (kElementwise || kRef) result.all.kl = total(sums[kKl]);
  if constexpr (kElementwise) {
    result.size = total(sums[kSize]);
    result.positive = total(sums[kPositive]);
    result.negative = total(sums[kNegative]);
  }
  for (T most : d_max) result.all.d_max = std::max(result.all.d_max, static_cast<double>(most));
  if (std::isnan(result.all.d_abs)) result.all.d_max = result.all.d_abs;
  return result;
}

template <typename T>
Coefficients finish_sample(const LossArgs& a, int64_t b, const WeightedSums<double>& sums, bool writes) {
  double details[kDetails];
  const Sample sample = sample_of(a, b);
  const Coefficients c = elementwise(a) ? finish(a, sample, sums, details)
                                        : finish(a, sample, sums.all, part_of(a, b).length, details);
  for (int i = 0; writes && i < kDetails; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(details[i]);
  return c;
}

template <typename T, typename S, bool kElementwise, bool kRef>
void chunk_grad(const LossArgs& a, int64_t b, int64_t row, int64_t start, int64_t count, const Coefficients& c,
                bool passes, Buffers<T>& buf) {
  const Chunk<T, S> in = load_chunk<T, S, kElementwise, kRef>(a, b, row, start, count, buf);
  // c+ e+ + c- e- by base and d, so that what cancels, all of it where v_theta = v_old and r = 1/2, does so in double.
  const T of_base = static_cast<T>(c.positive + c.negative), of_kl = static_cast<T>(c.kl);
  const T of_d = static_cast<T>((c.positive - c.negative) * static_cast<double>(in.f.step));
  auto one = [&](auto few, int64_t k, T v_theta, T v_old, T x_t, T x0, T v_ref) {
    T d, base, value;
    errors<T>(v_theta, v_old, x_t, x0, in.f, d, base);
    const T positive = fused(in.f.step, d, base), negative = fused(-in.f.step, d, base);
    const T m = kElementwise ? in.mask[k] : T(1);
    if constexpr (kElementwise)
      value = policy_gradient(c, m, in.of_policy[k], in.r[k], positive, negative);
    else if constexpr (few.value)
      value = static_cast<T>(c.positive) * positive + static_cast<T>(c.negative) * negative;
    else
      value = fused(of_base, base, of_d * d);
    if constexpr (kRef) value = fused(of_kl * m, v_theta - v_ref, value);
    return m > 0 ? value : 0;
  };
  S* grad = target<T, S>(a.grad, row, start, buf.grad);
  passes = passes && grad != static_cast<void*>(buf.grad) && reinterpret_cast<uintptr_t>(grad) % 32 == 0;
  int64_t k = 0;
  // As a function of its own it would have to take the closure's values for what the stores may change, and stay scalar.
  auto write = [&](auto past_caches) __attribute__((always_inline)) {
    alignas(32) S held[2 * kLanes];
    for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
      S* to = past_caches ? held : grad + k;
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        auto half = [&](int i) {
          auto at = [&](const S* data) { return part(data + k, l, i); };
          return one(std::false_type{}, k + place_of<S>(l, i), at(in.v_theta), at(in.v_old), at(in.x_t), at(in.x0),
                     kRef ? at(in.v_ref) : T(0));
        };
        set_parts(to, l, half(0), half(1));
      }
      if (past_caches) pass_caches<sizeof held>(grad + k, held);
    }
  };
  passes ? write(std::true_type{}) : write(std::false_type{});
  auto write_rest = [&](auto few) {
    for (; k < count; ++k)
      set(grad[k], one(few, k, get(in.v_theta[k]), get(in.v_old[k]), get(in.x_t[k]), get(in.x0[k]),
                       kRef ? get(in.v_ref[k]) : T(0)));
  };
  part_of(a, b).length <= kFew ? write_rest(std::true_type{}) : write_rest(std::false_type{});
  if constexpr (std::is_same_v<S, T>)
    if (grad == buf.grad) store(a.grad, row, start, count, grad);
}

template <typename T>
void reduce(const LossArgs& a) {
  const T *policy = static_cast<const T*>(a.details), *kl = policy + 5 * a.batch;
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    sum += (static_cast<double>(policy[b]) + a.kl_weight * static_cast<double>(kl[b])) * value(a.loss_weight, b);
  *static_cast<T*>(a.loss) = static_cast<T>(sum);
}

// A sample's gradient is written in the same visit that sums its errors, while it is still in cache. Every thread has as
// many samples of its own; those left over, and all where there are few, are shared by the threads one at a time. The
// bits are the same.
template <typename T, typename S, bool kElementwise, bool kRef>
void loss(const LossArgs& a) {
  const bool passes = a.want_grad && passes_caches(a.grad, a.batch, a.elements);
  auto chunks_of = [](const Part& part) { return (part.length + kChunk - 1) / kChunk; };
  auto length = [](const Part& part, int64_t c) { return std::min(kChunk, part.length - c * kChunk); };
  auto sums_of = [&](int64_t b, const Part& p, int64_t c, Buffers<T>& buf) {
    return chunk_sums<T, S, kElementwise, kRef>(a, b, p.row, p.start + c * kChunk, length(p, c), buf);
  };
  auto write_grad = [&](int64_t b, const Part& p, int64_t c, const Coefficients& coefficients, Buffers<T>& buf) {
    chunk_grad<T, S, kElementwise, kRef>(a, b, p.row, p.start + c * kChunk, length(p, c), coefficients, passes, buf);
  };
  int64_t most = 0;
  for (int64_t b = 0; b < (a.offsets ? a.batch : 1); ++b) most = std::max(most, chunks_of(part_of(a, b)));
  // Two sets, so that a thread may start the next sample while another still adds up this one.
  std::vector<WeightedSums<double>> partial(2 * most);
#pragma omp parallel
  {
    Buffers<T> buf;
    const int64_t threads = omp_get_num_threads();
    int64_t own = a.batch < kSamplesPerThread * threads ? 0 : a.batch - a.batch % threads;
    if (most == 1) own = a.batch;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < own; ++b) {
      const Part p = part_of(a, b);
      WeightedSums<double> sums{};
      for (int64_t c = 0; c < chunks_of(p); ++c) sums.add(sums_of(b, p, c, buf));
      const Coefficients coefficients = finish_sample<T>(a, b, sums, true);
      // Backwards: what was read last is nearest.
      for (int64_t c = a.want_grad ? chunks_of(p) : 0; c-- > 0;) write_grad(b, p, c, coefficients, buf);
    }
    for (int64_t b = own; b < a.batch; ++b) {
      WeightedSums<double>* mine = partial.data() + (b & 1) * most;
      const Part p = part_of(a, b);
      const int64_t chunks = chunks_of(p), thread = omp_get_thread_num();
      const int64_t first = chunks * thread / threads, last = chunks * (thread + 1) / threads;
      for (int64_t c = first; c < last; ++c) mine[c] = sums_of(b, p, c, buf);
#pragma omp barrier
      WeightedSums<double> sums{};
      for (int64_t c = 0; c < chunks; ++c) sums.add(mine[c]);
      const Coefficients coefficients = finish_sample<T>(a, b, sums, thread == 0);
      for (int64_t c = a.want_grad ? last : first; c-- > first;) write_grad(b, p, c, coefficients, buf);
    }
    if (passes) finish_passing();
  }
  reduce<T>(a);
}

template <typename T, typename S, bool kElementwise>
void loss(const LossArgs& a) {
  a.has_ref ? loss<T, S, kElementwise, true>(a) : loss<T, S, kElementwise, false>(a);
}

// Some neighbouring tokens of sample b, whose channels are rows of `width` values each.
template <typename T, bool kRef>
struct Tokens {
  const LossArgs& a;
  Buffers<T>& buf;
  int64_t width;

  // Rows of a tensor in a buffer: in the tensor they are often a power of two apart, and would share a cache's places.
  void load_rows(const View& view, int64_t b, int64_t start, int64_t count, T* rows) const {
    for (int64_t c = 0; c < a.channels; ++c) {
      T* row = rows + c * width;
      const T* found = load(view, b, start + c * a.inner, count, row);
      if (found != row) std::copy_n(found, count, row);
      std::fill_n(row + count, width - count, T(0));
    }
  }

  // The mean over the tokens of each of their details, times `share`; of the last the largest.
  void run(int64_t b, int64_t start, int64_t count, double share, double* details) const {
    load_rows(a.v_theta, b, start, count, buf.v_theta);
    load_rows(a.v_old, b, start, count, buf.v_old);
    load_rows(a.x_t, b, start, count, buf.x_t);
    load_rows(a.x0, b, start, count, buf.x0);
    if (kRef) load_rows(a.v_ref, b, start, count, buf.v_ref);
    Sample sample = sample_of(a, b);
    sample.loss_weight *= share;
    const Affine<T> f = affine<T>(a.prediction, sample.t, sample.beta);
    for (int64_t k = 0; k < count; k += kLanes) {
      T lane[kKl + 1][kLanes] = {{0}}, d_max[kLanes] = {0};
      for (int64_t i = k; i < a.channels * width; i += width) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          T d, base;
          errors<T>(buf.v_theta[i + l], buf.v_old[i + l], buf.x_t[i + l], buf.x0[i + l], f, d, base);
          const T positive = fused(f.step, d, base), negative = fused(-f.step, d, base), most = std::abs(d);
          lane[kPositiveAbs][l] += std::abs(positive);
          lane[kNegativeAbs][l] += std::abs(negative);
          lane[kPositiveSq][l] += positive * positive;
          lane[kNegativeSq][l] += negative * negative;
          lane[kDAbs][l] += most;
          if constexpr (kRef) {
            const T delta = buf.v_theta[i + l] - buf.v_ref[i + l];
            lane[kKl][l] += delta * delta;
          }
          d_max[l] = d_max[l] > most ? d_max[l] : most;
        }
      }
      const bool few = a.channels <= kFew;
      // Of the errors themselves where they are few.
      T of_base[kLanes] = {0}, of_d[kLanes] = {0}, of_kl = 0;
      for (int l = 0; l < std::min<int64_t>(kLanes, count - k); ++l) {
        const double d_abs = static_cast<double>(lane[kDAbs][l]);
        const Sums<double> sums{static_cast<double>(lane[kPositiveAbs][l]), static_cast<double>(lane[kNegativeAbs][l]),
                                static_cast<double>(lane[kPositiveSq][l]), static_cast<double>(lane[kNegativeSq][l]),
                                static_cast<double>(lane[kKl][l]), d_abs,
                                std::isnan(d_abs) ? d_abs : static_cast<double>(d_max[l])};
        double each[kDetails];
        const Coefficients c = finish(a, sample, sums, a.channels, each);
        of_base[l] = static_cast<T>(few ? c.positive : c.positive + c.negative);
        of_d[l] = static_cast<T>(few ? c.negative : (c.positive - c.negative) * static_cast<double>(f.step));
        of_kl = static_cast<T>(c.kl);
        add_details(each, share, details);
      }
      for (int64_t i = k; a.want_grad && i < a.channels * width; i += width) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          T d, base;
          errors<T>(buf.v_theta[i + l], buf.v_old[i + l], buf.x_t[i + l], buf.x0[i + l], f, d, base);
          const T positive = fused(f.step, d, base), negative = fused(-f.step, d, base);
          T value = few ? of_base[l] * positive + of_d[l] * negative : fused(of_base[l], base, of_d[l] * d);
          if constexpr (kRef) value = fused(of_kl, buf.v_theta[i + l] - buf.v_ref[i + l], value);
          buf.grad[i + l] = value;
        }
      }
    }
    for (int64_t c = 0; a.want_grad && c < a.channels; ++c)
      store(a.grad, b, start + c * a.inner, count, buf.grad + c * width);
  }

  static void add_details(const double* each, double share, double* details) {
    for (int i = 0; i < kDetails - 1; ++i) details[i] += share * each[i];
    // A NaN, which compares false, must not be lost.
    const double most = each[kDetails - 1];
    if (most > details[kDetails - 1] || most != most) details[kDetails - 1] = most;
  }
};

// With a weight per token: every token's errors are divided by their mean over its channels.
template <typename T, bool kRef>
void token_loss(const LossArgs& a) {
  const int64_t tokens = a.elements / a.channels, outer = tokens / a.inner;
  const int64_t width = std::min((a.inner + kLanes - 1) / kLanes, kChunk / a.channels / kLanes) * kLanes;
  const int64_t across = (a.inner + width - 1) / width, tiles = outer * across;
  std::vector<double> partial(a.batch * tiles * kDetails);
#pragma omp parallel
  {
    Buffers<T> buf;
    const Tokens<T, kRef> part{a, buf, width};
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * tiles; ++item) {
      const int64_t tile = item % tiles, first = tile % across * width;
      part.run(item / tiles, tile / across * a.channels * a.inner + first, std::min(width, a.inner - first),
               1.0 / static_cast<double>(tokens), partial.data() + item * kDetails);
    }
  }
  for (int64_t b = 0; b < a.batch; ++b) {
    double details[kDetails] = {0};
    for (int64_t item = b * tiles; item < (b + 1) * tiles; ++item)
      Tokens<T, kRef>::add_details(partial.data() + item * kDetails, 1.0, details);
    for (int i = 0; i < kDetails; ++i) static_cast<T*>(a.details)[i * a.batch + b] = static_cast<T>(details[i]);
  }
  reduce<T>(a);
}

template <typename T>
void token_loss(const LossArgs& a) {
  a.has_ref ? token_loss<T, true>(a) : token_loss<T, false>(a);
}

// Whether the tensors can be read, and the gradient written, without buffers.
bool all_bf16(const LossArgs& a) {
  return plain_bf16(a.v_theta) && plain_bf16(a.v_old) && plain_bf16(a.x_t) && plain_bf16(a.x0) &&
         (!a.has_ref || plain_bf16(a.v_ref)) && (!a.want_grad || plain_bf16(a.grad));
}

}  // namespace

void nft_loss(const LossArgs& args) {
  if (args.want_grad) expect_writes(args.grad, args.batch, args.elements);
  if (args.channels) return args.double_math ? token_loss<double>(args) : token_loss<float>(args);
  const bool weighted = elementwise(args);
  if (args.double_math)
    weighted ? loss<double, double, true>(args) : loss<double, double, false>(args);
  else if (all_bf16(args))
    weighted ? loss<float, uint16_t, true>(args) : loss<float, uint16_t, false>(args);
  else
    weighted ? loss<float, float, true>(args) : loss<float, float, false>(args);
}

}  // namespace NFT_ISA
}  // namespace nft

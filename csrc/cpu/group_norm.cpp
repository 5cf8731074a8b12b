// Group normalization of pictures whose channels are neighbours in memory, and the SiLU of it, on the CPU; compiled once
// per instruction set (NFT_ISA names the namespace).
//
// A sample is cut in the same way whatever the batch and the number of threads, so its bits depend on neither.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "exp.h"
#include "view.h"

namespace nft {
namespace NFT_ISA {
namespace {

// Elements that are summed in the compute type: they are read twice, and stay in the first-level cache.
constexpr int64_t kBlock = 4096;
// Elements of a line at least, which is the pixels that are taken at a time: of few channels one would make short loops.
constexpr int64_t kLine = 64;
// Most parts of a sample, which are what threads share where there are fewer samples than threads.
constexpr int64_t kParts = 64;

struct Cut {
  explicit Cut(const GroupNormArgs& a)
      : line(std::max<int64_t>(kLine / a.channels, 1) * a.channels), block(std::max<int64_t>(kBlock / line, 1) * line) {
    const int64_t blocks = (a.elements + block - 1) / block;
    part = (blocks + kParts - 1) / kParts * block;
    parts = (a.elements + part - 1) / part;
  }
  int64_t line, block, part, parts;
};

template <typename F>
void each_block(const GroupNormArgs& a, const Cut& cut, int64_t part, F body) {
  const int64_t end = std::min((part + 1) * cut.part, a.elements);
  for (int64_t start = part * cut.part; start < end; start += cut.block) body(start, std::min(cut.block, end - start));
}

template <typename F>
void each_line(int64_t line, int64_t count, F body) {
  for (int64_t start = 0; start < count; start += line)
    each(std::min(line, count - start), [&](int64_t l) { body(start + l, l); });
}

// Adds up the pixels of a line.
template <typename T>
void fold(T* line, int64_t length, int64_t channels) {
  for (int64_t start = channels; start < length; start += channels)
    for (int64_t c = 0; c < channels; ++c) line[c] += line[start + c];
}

// The mean of `count` elements of each channel and the sum of their squared distances from it.
struct Moments {
  Moments(double* data, int64_t channels) : mean(data), squares(data + channels) {}
  double *mean, *squares;
  double count = 0;

  // As Chan et al. (1979), after whom nothing cancels where the mean is large.
  template <typename F>
  void add(double more, int64_t channels, F moments) {
    const double share = more / (count + more), weight = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const auto [other, distances] = moments(c);
      const double apart = other - mean[c];
      mean[c] += share * apart;
      squares[c] += distances + weight * apart * apart;
    }
    count += more;
  }
};

template <typename T>
void measure(const GroupNormArgs& a, const Cut& cut, int64_t b, int64_t part, Moments moments) {
  const int64_t channels = a.channels;
  const std::unique_ptr<T[]> buffer(new T[cut.block + 3 * cut.line]);
  T *centre = buffer.get() + cut.block, *left = centre + cut.line, *squares = left + cut.line;
  each_block(a, cut, part, [&](int64_t start, int64_t count) {
    const T* x = load(a.x, b, start, count, buffer.get());
    const T pixels = static_cast<T>(count / channels);
    std::fill_n(centre, 3 * cut.line, T(0));
    each_line(cut.line, count, [&](int64_t k, int64_t l) { centre[l] += x[k]; });
    fold(centre, cut.line, channels);
    for (int64_t c = 0; c < channels; ++c) centre[c] /= pixels;
    for (int64_t l = channels; l < cut.line; l += channels) std::copy_n(centre, channels, centre + l);
    // What rounding left of the mean is found on the way, where a large mean has cancelled.
    each_line(cut.line, count, [&](int64_t k, int64_t l) {
      const T centred = x[k] - centre[l];
      left[l] += centred;
      squares[l] = fused(centred, centred, squares[l]);
    });
    fold(left, cut.line, channels);
    fold(squares, cut.line, channels);
    const double share = 1 / static_cast<double>(pixels);
    moments.add(pixels, channels, [&](int64_t c) {
      const double shift = left[c] * share;
      return std::pair<double, double>(centre[c] + shift, squares[c] - shift * left[c]);
    });
  });
}

// Of channels that are normalized and weighted to (x - centre) scale + rest, for every element of a line.
template <typename T>
struct Normalization {
  explicit Normalization(int64_t line)
      : data(new T[3 * line]), centre(data.get()), scale(centre + line), rest(scale + line) {}
  std::unique_ptr<T[]> data;
  T *centre, *scale, *rest;
};

template <typename T>
Normalization<T> normalization(const GroupNormArgs& a, const Cut& cut, const Moments& moments) {
  Normalization<T> found(cut.line);
  const int64_t size = a.channels / a.groups;
  for (int64_t group = 0; group < a.channels; group += size) {
    double mean = 0, squares = 0;
    for (int64_t c = group; c < group + size; ++c) mean += moments.mean[c] / static_cast<double>(size);
    for (int64_t c = group; c < group + size; ++c) {
      const double apart = moments.mean[c] - mean;
      squares += moments.squares[c] + moments.count * apart * apart;
    }
    // Rounding may leave less than nothing where all elements are the same; a NaN stays one.
    const double variance = std::max(squares / (moments.count * static_cast<double>(size)), 0.0);
    const double inverse = 1 / std::sqrt(variance + a.eps);
    const T centre = static_cast<T>(mean);
    for (int64_t c = group; c < group + size; ++c) {
      const double scale = inverse * value(a.weight, c);
      const T rest = static_cast<T>(value(a.bias, c) - (mean - static_cast<double>(centre)) * scale);
      for (int64_t l = c; l < cut.line; l += a.channels) {
        found.centre[l] = centre;
        found.scale[l] = static_cast<T>(scale);
        found.rest[l] = rest;
      }
    }
  }
  return found;
}

template <typename T>
void activate(const GroupNormArgs& a, const Cut& cut, int64_t b, int64_t part, const Normalization<T>& normed) {
  const std::unique_ptr<T[]> buffer(new T[2 * cut.block]);
  const T *centre = normed.centre, *scale = normed.scale, *rest = normed.rest;
  each_block(a, cut, part, [&](int64_t start, int64_t count) {
    const T* x = load(a.x, b, start, count, buffer.get());
    T* out = place(a.out, b, start, buffer.get() + cut.block);
    each_line(cut.line, count, [&](int64_t k, int64_t l) {
      const T z = fused(x[k] - centre[l], scale[l], rest[l]);
      out[k] = damped(z, -z);
    });
    if (out == buffer.get() + cut.block) store(a.out, b, start, count, out);
  });
}

// Threads share parts only outside of a parallel region: within one, even of a single thread, OpenMP's runtime would
// start new threads at every call.
template <typename F>
void each_part(const Cut& cut, bool shared, F body) {
#pragma omp parallel for schedule(static) if (shared)
  for (int64_t part = 0; part < cut.parts; ++part) body(part);
}

template <typename T>
void normalize(const GroupNormArgs& a, const Cut& cut, int64_t b, bool shared) {
  const int64_t size = 2 * a.channels;
  std::vector<double> moments(cut.parts * size);
  auto pixels = [&](int64_t part) {
    return static_cast<double>((std::min((part + 1) * cut.part, a.elements) - part * cut.part) / a.channels);
  };
  each_part(cut, shared,
            [&](int64_t part) { measure<T>(a, cut, b, part, Moments(&moments[part * size], a.channels)); });
  Moments all(moments.data(), a.channels);
  all.count = pixels(0);
  for (int64_t part = 1; part < cut.parts; ++part) {
    const Moments other(&moments[part * size], a.channels);
    all.add(pixels(part), a.channels, [&](int64_t c) { return std::pair(other.mean[c], other.squares[c]); });
  }
  const Normalization<T> normed = normalization<T>(a, cut, all);
  each_part(cut, shared, [&](int64_t part) { activate(a, cut, b, part, normed); });
}

template <typename T>
void run(const GroupNormArgs& a) {
  const Cut cut(a);
  if (a.batch < omp_get_max_threads()) {
    for (int64_t b = 0; b < a.batch; ++b) normalize<T>(a, cut, b, a.elements >= kParallel);
    return;
  }
#pragma omp parallel for schedule(static) if (a.batch * a.elements >= kParallel)
  for (int64_t b = 0; b < a.batch; ++b) normalize<T>(a, cut, b, false);
}

}  // namespace

void group_norm_silu(const GroupNormArgs& a) { a.x.dtype == kFloat64 ? run<double>(a) : run<float>(a); }

}  // namespace NFT_ISA
}  // namespace nft

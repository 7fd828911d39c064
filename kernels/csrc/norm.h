// GroupNorm's algorithm, as far as CPU and GPU share it.
//
// Statistics are taken per channel and per chunk of pixels (mean and sum of squared deviations) and merged into
// groups in double. Within a chunk, deviations are from a pivot, the mean of its first pixels: a large mean costs
// no digits, one reading of x is enough, and the chunks, which depend on the size alone, make the bits repeat.
#pragma once
#include "kernels.h"

constexpr int64_t PIVOT_PIXELS = 8;

struct Chunks {
  int64_t pixels, count;
  OFTSR explicit Chunks(int64_t P) {
    pixels = P > 256 * 1024 ? (P + 1023) / 1024 : 256;
    count = (P + pixels - 1) / pixels;
  }
  OFTSR int64_t size(int64_t i, int64_t P) const { return i + 1 < count ? pixels : P - i * pixels; }
};

// Doubles of working memory: two sums for each channel and chunk of every picture, and four for each channel of every picture.
inline int64_t norm_workspace(const Norm& a) { return a.B * a.C * (2 * Chunks(a.P).count + 4); }

// Number of values, their mean, and the sum of squared deviations from it.
struct Moments {
  double n, mean, m2;
  // From sums of n deviations from a pivot and of their squares.
  static OFTSR Moments about(double pivot, double n, double sum, double squares) { return {n, pivot + sum / n, squares - sum * sum / n}; }
  // Chan, Golub & LeVeque 1979: two sets' moments make the union's.
  OFTSR void merge(Moments o) {
    double both = n + o.n, delta = o.mean - mean;
    if (both == 0) return;
    mean += delta * o.n / both;
    m2 += o.m2 + delta * delta * n * o.n / both;
    n = both;
  }
  OFTSR double rstd(double eps) const { return 1 / sqrt((n > 0 ? m2 / n : 0) + eps); }
};

// What a channel's pixels need: u = (x - mean) gain + offset, y = silu(u); in the backward pass, with du the
// gradient of u, dx = gain du + (x - mean) slope + level.
template <class A> struct Channel { A mean, gain, offset, slope, level; };

// norm, affine and scale-shift as one multiplication and one addition.
template <class A> OFTSR Channel<A> channel(const Norm& a, int64_t b, int64_t c) {
  int64_t i = b * a.G + c / (a.C / a.G);
  A weight = static_cast<const A*>(a.weight)[c], bias = static_cast<const A*>(a.bias)[c];
  if (a.scale) {
    A scale = A(1) + static_cast<const A*>(a.scale)[b * a.scale_stride + c];
    weight = weight * scale;
    bias = bias * scale + static_cast<const A*>(a.shift)[b * a.shift_stride + c];
  }
  return {static_cast<const A*>(a.mean)[i], weight * static_cast<const A*>(a.rstd)[i], bias, A(0), A(0)};
}

// A channel's two sums, of du and of du (x - mean), to the gradients of its parameters...
struct Gradients { double weight, bias, scale, shift; };
template <class A> OFTSR Gradients parameter_gradients(const Norm& a, int64_t b, int64_t c, double du, double dux) {
  double rstd = static_cast<const A*>(a.rstd)[b * a.G + c / (a.C / a.G)];
  double scale = a.scale ? 1 + double(static_cast<const A*>(a.scale)[b * a.scale_stride + c]) : 1;
  double weight = static_cast<const A*>(a.weight)[c], bias = static_cast<const A*>(a.bias)[c];
  return {scale * dux * rstd, scale * du, weight * rstd * dux + bias * du, du};
}

// ... and, summed over the group with its weights (gains), to what the statistics' own dependence on x adds to dx.
template <class A> OFTSR void through_statistics(const Norm& a, int64_t b, int64_t group, double gain_du, double gain_dux, A& slope, A& level) {
  double rstd = static_cast<const A*>(a.rstd)[b * a.G + group], n = double(a.P) * double(a.C / a.G);
  slope = A(-rstd * rstd * gain_dux / n);
  level = A(-gain_du / n);
}

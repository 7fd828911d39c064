// GroupNorm, scale-shift and SiLU on the CPU, forward and backward. PyTorch makes three or four trips through
// memory; two are needed, since every output depends on the statistics of its whole group: one that reads x,
// one that reads x and writes y. A picture that fits a core's cache is done by one core, and comes from memory once.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "norm.h"

using torch::stable::parallel_for;

// Element (c, p) of one picture. In channels_last memory the vector loop runs along the channels of a pixel,
// in contiguous memory along the pixels of a channel.
template <bool LAST, class T> struct Plane {
  T* data;
  int64_t stride;
  OFTSR T& operator()(int64_t c, int64_t p) const { return LAST ? data[p * stride + c] : data[c * stride + p]; }
};
template <bool LAST, class T> static Plane<LAST, T> plane(const View& v, int64_t b) { return {v.at<T>(b, 0, 0), LAST ? v.w : v.c}; }

// f(c, p) for the channels c0 to c1 and the pixels first to last.
template <bool LAST, class F> OFTSR void for_elements(int64_t c0, int64_t c1, int64_t first, int64_t last, F f) {
  if (LAST) {
    for (int64_t p = first; p < last; p++) {
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) f(c, p);
    }
  } else {
    for (int64_t c = c0; c < c1; c++) {
#pragma omp simd
      for (int64_t p = first; p < last; p++) f(c, p);
    }
  }
}

// The sums of f(c, p)'s two values along one channel in contiguous memory. Inlined, GCC 12 would give up on vectors.
template <class A, class F> __attribute__((noinline)) static void sum_pixels(int64_t c, int64_t first, int64_t last, A& sum0, A& sum1, F f) {
  A s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
  for (int64_t p = first; p < last; p++) f(c, p, s0, s1);
  sum0 = s0;
  sum1 = s1;
}

// For each channel, the sums of f(c, p)'s two values. In channels_last memory the sums lie in memory, too; where f is
// light, FOUR pixels for each trip to them pay (where it is heavy, the compiler would give up on vectors).
template <bool LAST, bool FOUR, class A, class F> OFTSR void sum_channels(int64_t c0, int64_t c1, int64_t first, int64_t last, A* sum0, A* sum1, F f) {
  if (LAST) {
    std::fill(sum0 + c0, sum0 + c1, A(0));
    std::fill(sum1 + c0, sum1 + c1, A(0));
    for (; FOUR && first + 4 <= last; first += 4) {
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) {
        A s0 = 0, s1 = 0;
        f(c, first, s0, s1), f(c, first + 1, s0, s1), f(c, first + 2, s0, s1), f(c, first + 3, s0, s1);
        sum0[c] += s0;
        sum1[c] += s1;
      }
    }
    for_elements<true>(c0, c1, first, last, [=](int64_t c, int64_t p) { f(c, p, sum0[c], sum1[c]); });
  } else {
    for (int64_t c = c0; c < c1; c++) sum_pixels(c, first, last, sum0[c], sum1[c], f);
  }
}

// f(b) for each picture: one core a picture where that keeps all cores busy, else the picture's own loops are shared out.
template <class F> static void for_pictures(int64_t B, F f) {
  int64_t threads = torch::stable::get_num_threads();
  if (B % threads == 0 || B >= 4 * threads) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) { for (int64_t b = begin; b < end; b++) f(b); });
  } else {
    for (int64_t b = 0; b < B; b++) f(b);
  }
}

// f(begin, end), chunks of one picture, shared out among the cores.
template <class F> static void for_chunks(const Norm& a, F f) {
  Chunks chunks(a.P);
  parallel_for(0, chunks.count, std::max<int64_t>(1, 32768 / (a.C * chunks.pixels)), f);
}

// f(chunk, its first pixel, its end, first channel, end) in the order of memory: in contiguous memory a channel's chunks
// follow one another, and reading them so is up to 1.4 times as fast as all channels of one chunk.
template <bool LAST, class F> OFTSR void in_order(const Norm& a, int64_t begin, int64_t end, F f) {
  Chunks chunks(a.P);
  for (int64_t c = 0, channels = LAST ? a.C : 1; c < a.C; c += channels)
    for (int64_t i = begin; i < end; i++) f(i, i * chunks.pixels, i * chunks.pixels + chunks.size(i, a.P), c, c + channels);
}

// f(x's storage type, whether the channels lie next to one another)
template <class F> static void by_layout(const View& x, F f) {
  by_type(x.dtype, [&](auto type) {
    if (x.c == 1) f(type, std::true_type());
    else f(type, std::false_type());
  });
}

// A picture's coefficients, one array each, as the vector loops along the channels want them.
template <class A> struct Coefficients {
  std::vector<A> mean, gain, offset, slope, level;
  Coefficients(const Norm& a, int64_t b) : mean(a.C), gain(a.C), offset(a.C), slope(a.C), level(a.C) {
    for (int64_t c = 0; c < a.C; c++) {
      Channel<A> k = channel<A>(a, b, c);
      mean[c] = k.mean, gain[c] = k.gain, offset[c] = k.offset;
    }
  }
};

// The mean and 1 / deviation of each group of picture b. Chunks become one for all channels side by side, in vectors.
template <bool LAST, class T> static void statistics(const Norm& a, int64_t b, double eps) {
  using A = arith<T>;
  Chunks chunks(a.P);
  Plane<LAST, T> x = plane<LAST, T>(a.x, b);
  int64_t C = a.C;
  std::vector<double> parts((chunks.count + 1) * 2 * C);  // the channels' means and squared deviations: of all so far, then of each chunk
  for_chunks(a, [&](int64_t begin, int64_t end) {
    std::vector<A> work(4 * C);
    A *pivot = work.data(), *sum = pivot + C, *squares = sum + C, *unused = squares + C;
    in_order<LAST>(a, begin, end, [=, &parts](int64_t i, int64_t first, int64_t last, int64_t c0, int64_t c1) {
      int64_t early = std::min(PIVOT_PIXELS, last - first);
      A share = A(1) / A(early);
      sum_channels<LAST, false>(c0, c1, first, first + early, pivot, unused, [=](int64_t c, int64_t p, A& s, A&) { s += load(x(c, p)) * share; });
      sum_channels<LAST, true>(c0, c1, first, last, sum, squares, [=](int64_t c, int64_t p, A& s, A& q) {
        A d = load(x(c, p)) - pivot[c];
        s += d;
        q += d * d;
      });
      double *mean = parts.data() + (i + 1) * 2 * C, *m2 = mean + C, n = double(last - first);
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) {
        Moments m = Moments::about(pivot[c], n, sum[c], squares[c]);
        mean[c] = m.mean, m2[c] = m.m2;
      }
    });
  });
  double *mean = parts.data(), *m2 = mean + C, n = 0;
  for (int64_t i = 0; i < chunks.count; i++) {
    const double *chunk_mean = mean + (i + 1) * 2 * C, *chunk_m2 = chunk_mean + C, more = double(chunks.size(i, a.P));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      Moments all{n, mean[c], m2[c]};
      all.merge({more, chunk_mean[c], chunk_m2[c]});
      mean[c] = all.mean, m2[c] = all.m2;
    }
    n += more;
  }
  for (int64_t g = 0, D = C / a.G; g < a.G; g++) {
    Moments all{};
    for (int64_t c = g * D; c < (g + 1) * D; c++) all.merge({n, mean[c], m2[c]});
    static_cast<A*>(a.mean)[b * a.G + g] = A(all.mean);
    static_cast<A*>(a.rstd)[b * a.G + g] = A(all.rstd(eps));
  }
}

template <> void group_norm_silu(Cpu, const Norm& a, double eps, double*, View y_view) {
  by_layout(a.x, [&](auto type, auto last) {
    using T = decltype(type);
    using A = arith<T>;
    constexpr bool LAST = decltype(last)::value;
    Chunks chunks(a.P);
    for_pictures(a.B, [&](int64_t b) {
      statistics<LAST, T>(a, b, eps);
      Coefficients<A> k(a, b);
      const A *mean = k.mean.data(), *gain = k.gain.data(), *offset = k.offset.data();
      Plane<LAST, T> x = plane<LAST, T>(a.x, b), y = plane<LAST, T>(y_view, b);
      for_chunks(a, [&](int64_t begin, int64_t end) {
        for_elements<LAST>(0, a.C, begin * chunks.pixels, std::min(end * chunks.pixels, a.P), [=](int64_t c, int64_t p) { y(c, p) = store<T>(silu((load(x(c, p)) - mean[c]) * gain[c] + offset[c])); });
      });
    });
  });
}

// Two trips again: the sums that the statistics and the parameters need, then dx. The gradient du of SiLU's argument, which costs
// an exponential, waits in dx's place for the second; where dx has too few bits for it, it is made anew.
template <> void group_norm_silu_backward(Cpu, const Norm& a, View dy_view, double*, View dx_view, void* dweight, void* dbias, void* dscale, void* dshift) {
  by_layout(a.x, [&](auto type, auto last) {
    using T = decltype(type);
    using A = arith<T>;
    constexpr bool LAST = decltype(last)::value;
    constexpr bool KEPT = sizeof(T) == sizeof(A);
    Chunks chunks(a.P);
    std::vector<double> of_weight(a.B * a.C), of_bias(a.B * a.C);
    for_pictures(a.B, [&](int64_t b) {
      Coefficients<A> k(a, b);
      const A *mean = k.mean.data(), *gain = k.gain.data(), *offset = k.offset.data();
      Plane<LAST, T> x = plane<LAST, T>(a.x, b), dy = plane<LAST, T>(dy_view, b), dx = plane<LAST, T>(dx_view, b);
      std::vector<A> sums(2 * chunks.count * a.C);
      for_chunks(a, [&](int64_t begin, int64_t end) {
        in_order<LAST>(a, begin, end, [=, &a, &sums](int64_t i, int64_t first, int64_t last, int64_t c0, int64_t c1) {
          A* du = sums.data() + 2 * i * a.C;
          sum_channels<LAST, false>(c0, c1, first, last, du, du + a.C, [=](int64_t c, int64_t p, A& s0, A& s1) {
            A d = load(x(c, p)) - mean[c], du = load(dy(c, p)) * silu_slope(d * gain[c] + offset[c]);
            if (KEPT) dx(c, p) = store<T>(du);
            s0 += du;
            s1 += du * d;
          });
        });
      });
      for (int64_t g = 0, D = a.C / a.G; g < a.G; g++) {
        double gain_du = 0, gain_dux = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++) {
          double du = 0, dux = 0;
          for (int64_t i = 0; i < chunks.count; i++) {
            du += sums[2 * i * a.C + c];
            dux += sums[(2 * i + 1) * a.C + c];
          }
          gain_du += gain[c] * du;
          gain_dux += gain[c] * dux;
          Gradients d = parameter_gradients<A>(a, b, c, du, dux);
          of_weight[b * a.C + c] = d.weight;
          of_bias[b * a.C + c] = d.bias;
          if (dscale) static_cast<A*>(dscale)[b * a.C + c] = A(d.scale), static_cast<A*>(dshift)[b * a.C + c] = A(d.shift);
        }
        for (int64_t c = g * D; c < (g + 1) * D; c++) through_statistics(a, b, g, gain_du, gain_dux, k.slope[c], k.level[c]);
      }
      const A *slope = k.slope.data(), *level = k.level.data();
      for_chunks(a, [&](int64_t begin, int64_t end) {
        for_elements<LAST>(0, a.C, begin * chunks.pixels, std::min(end * chunks.pixels, a.P), [=](int64_t c, int64_t p) {
          A d = load(x(c, p)) - mean[c], du = KEPT ? load(dx(c, p)) : load(dy(c, p)) * silu_slope(d * gain[c] + offset[c]);
          dx(c, p) = store<T>(gain[c] * du + d * slope[c] + level[c]);
        });
      });
    });
    for (int64_t c = 0; c < a.C; c++) {
      double w = 0, s = 0;
      for (int64_t b = 0; b < a.B; b++) w += of_weight[b * a.C + c], s += of_bias[b * a.C + c];
      static_cast<A*>(dweight)[c] = A(w);
      static_cast<A*>(dbias)[c] = A(s);
    }
  });
}

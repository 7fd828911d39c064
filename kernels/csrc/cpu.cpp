// The elementwise kernels on the CPU. A picture is walked in strips of at most STRIP pixels of one row; a task
// is one strip of all channels, and PyTorch's own threads share the tasks out. Inside a strip one loop does
// one formula of flow.h for consecutive pixels, which the compiler turns into vector instructions: formulas
// have no branches and no calls, so 16 pixels go through Philox side by side in AVX-512. Every byte is read
// once and written once; for these kernels nothing else matters.
#include <torch/csrc/stable/ops.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "kernels.h"

constexpr int64_t STRIP = 512;  // four channels of noise in float are 8 KiB: they stay in the first-level cache

// f(task index, b, h, first pixel, number of pixels) for every strip.
template <class F> static void for_strips(Shape s, F f) {
  int64_t strips = (s.W + STRIP - 1) / STRIP;
  int64_t grain = std::max<int64_t>(1, 16384 / (s.C * std::min(s.W, STRIP) + 1));
  torch::stable::parallel_for(0, s.B * s.H * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t w = i % strips * STRIP, h = i / strips % s.H, b = i / strips / s.H;
      f(i, b, h, w, std::min(STRIP, s.W - w));
    }
  });
}

static int64_t count_strips(Shape s) { return s.B * s.H * ((s.W + STRIP - 1) / STRIP); }

// n pixels of one channel.
template <class T> struct Line {
  T* data;
  int64_t step;
};

template <class T> static Line<T> line(const View& v, int64_t b, int64_t c, int64_t h, int64_t w) { return {v.at<T>(b, c, h) + w * v.w, v.w}; }

// f(i-th element of each line), i < n. Neighbours in memory get a loop of their own, of vector instructions; collecting
// vectors from spread elements takes longer than it saves.
template <class F, class... T> OFTSR void each(int64_t n, F f, Line<T>... lines) {
  if (((lines.step == 1) && ...)) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) f(lines.data[i]...);
  } else {
    for (int64_t i = 0; i < n; i++) f(lines.data[i * lines.step]...);
  }
}

// ---- noise

// philox() for n neighbouring pixels. The compiler multiplies 32 by 32 bits with the 64-bit multiplication, which is three
// times as slow as the instruction made for it: hence AVX-512 by hand, elsewhere the plain loop. Each 64-bit lane holds a
// word in its lower half. The multiplication reads only that, and leaves the product's low word where the next round
// wants it, so that a round is two multiplications, two shifts and two exclusive ors; what is above the word is noise that
// nobody reads. Sixteen pixels go side by side, the even ones in one register and the odd ones in another.
#ifdef __AVX512F__
struct Lanes {
  __m512i c0, c1, c2, c3;
  void round(__m512i k0, __m512i k1) {
    __m512i p0 = _mm512_mul_epu32(c0, _mm512_set1_epi64(0xD2511F53)), p1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(0xCD9E8D57));
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);  // exclusive or of three
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
    c1 = p1;
    c3 = p0;
  }
};

static void interleave(uint32_t* out, __m512i even, __m512i odd) { _mm512_store_si512(out, _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))); }

static void philox_line(int64_t seed, uint32_t stream, uint32_t block, uint32_t h, uint32_t w0, int32_t n, uint32_t (*word)[STRIP]) {
  __m512i k0[10], k1[10];
  for (uint32_t r = 0; r < 10; r++) {
    k0[r] = _mm512_set1_epi64(uint32_t(seed) + r * 0x9E3779B9u);
    k1[r] = _mm512_set1_epi64(uint32_t(uint64_t(seed) >> 32) + r * 0xBB67AE85u);
  }
  const __m512i place = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), one = _mm512_set1_epi64(1);
  for (int32_t i = 0; i < n; i += 16) {  // the last 16 may run beyond n, not beyond the strip
    Lanes even{_mm512_add_epi32(_mm512_set1_epi64(w0 + uint32_t(i)), place), _mm512_set1_epi64(h), _mm512_set1_epi64(block), _mm512_set1_epi64(stream)}, odd = even;
    odd.c0 = _mm512_add_epi32(odd.c0, one);
    for (int r = 0; r < 10; r++) {
      even.round(k0[r], k1[r]);
      odd.round(k0[r], k1[r]);
    }
    interleave(word[0] + i, even.c0, odd.c0);
    interleave(word[1] + i, even.c1, odd.c1);
    interleave(word[2] + i, even.c2, odd.c2);
    interleave(word[3] + i, even.c3, odd.c3);
  }
}
#else
static void philox_line(int64_t seed, uint32_t stream, uint32_t block, uint32_t h, uint32_t w0, int32_t n, uint32_t (*word)[STRIP]) {
#pragma omp simd
  for (int32_t i = 0; i < n; i++) {
    Words r = philox(w0 + i, h, block, stream, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
    word[0][i] = r.r0, word[1][i] = r.r1, word[2][i] = r.r2, word[3][i] = r.r3;
  }
}
#endif

// Four channels of a strip's noise; the counter is the pixel's place, so a strip needs nothing from its neighbours.
// Each pixel's arithmetic is one long chain. In two short loops the processor sees several pixels' chains at once,
// and works on one while another waits.
struct Noise {
  float channel[4][STRIP];
  void fill(int64_t seed, uint32_t stream, uint32_t block, uint32_t h, uint32_t w0, int32_t n, int channels) {
    alignas(64) uint32_t word[4][STRIP];
    n = (n + 15) / 16 * 16;  // a strip's end is whole vectors, too
    philox_line(seed, stream, block, h, w0, n, word);
    for (int k = 0; k < channels; k += 2) {
      for (int32_t i = 0; i < n; i += 16) {
#pragma omp simd
        for (int32_t j = i; j < i + 16; j++) box_muller(word[k][j], word[k + 1][j], channel[k][j], channel[k + 1][j]);
      }
    }
  }
};

// f(b, c, h, w, n, noise of this strip and channel)
template <class F> static void for_noisy_strips(Shape s, PerImage<int64_t> seeds, uint32_t stream, Corner corner, F f) {
  for_strips(s, [&](int64_t, int64_t b, int64_t h, int64_t w, int64_t n) {
    Noise noise;
    for (int64_t c = 0; c < s.C; c++) {
      if (c % 4 == 0) noise.fill(seeds[b], stream, c / 4, h + corner.h, w + corner.w, n, int(std::min<int64_t>(4, s.C - c)));
      f(b, c, h, w, n, Line<float>{noise.channel[c % 4], 1});
    }
  });
}

template <> void normal(Cpu, Shape s, PerImage<int64_t> seeds, uint32_t stream, Corner corner, float* out) {
  for_noisy_strips(s, seeds, stream, corner, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n, Line<float> eps) {
    memcpy(out + ((b * s.C + c) * s.H + h) * s.W + w, eps.data, n * sizeof(float));
  });
}

// Reads x_lr, writes x_0 and x_lr: 3 C elements a pixel.
template <> void noise_augment(Cpu, Shape s, View x_lr, double sigma_p, PerImage<int64_t> seeds, Corner corner, View x_in) {
  by_type(x_lr.dtype, [&](auto type) {
    using T = decltype(type);
    using A = arith<T>;
    A signal = sqrt(1 - sigma_p * sigma_p), sigma = sigma_p;
    for_noisy_strips(s, seeds, 0, corner, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n, Line<float> noise) {
      each(n, [=](T lr, float eps, T& x_0, T& copy) {
        x_0 = store<T>(perturb<A>(load(lr), eps, signal, sigma));
        copy = lr;
      }, line<T>(x_lr, b, c, h, w), noise, line<T>(x_in, b, c, h, w), line<T>(x_in, b, c + s.C, h, w));
    });
  });
}

// Reads x_1 and x_lr, writes x_t, x_lr and the velocity: 5 C elements a pixel, the noise none.
template <> void flow_training_pair(Cpu, Shape s, View x_1, View x_lr, PerImage<float> t, double sigma_p, PerImage<int64_t> seeds, View x_in, View velocity) {
  by_type(x_lr.dtype, [&](auto type) {
    using T = decltype(type);
    using A = arith<T>;
    A signal = sqrt(1 - sigma_p * sigma_p), sigma = sigma_p;
    for_noisy_strips(s, seeds, 0, Corner{0, 0}, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n, Line<float> noise) {
      A tb = t[b];
      each(n, [=](T hr, T lr, float eps, T& x_t, T& copy, T& v) {
        A x_0 = perturb<A>(load(lr), eps, signal, sigma);
        x_t = store<T>(on_path<A>(x_0, load(hr), tb));
        copy = lr;
        v = store<T>(load(hr) - x_0);
      }, line<T>(x_1, b, c, h, w), line<T>(x_lr, b, c, h, w), noise, line<T>(x_in, b, c, h, w), line<T>(x_in, b, c + s.C, h, w), line<T>(velocity, b, c, h, w));
    });
  });
}

// ---- solver steps

template <class F> static void for_lines(Shape s, F f) {
  for_strips(s, [&](int64_t, int64_t b, int64_t h, int64_t w, int64_t n) {
    for (int64_t c = 0; c < s.C; c++) f(b, c, h, w, n);
  });
}

// Reads x and v, writes x: 3 C elements a pixel.
template <> void euler_step(Cpu, Shape s, View x, View v, Step dt) {
  by_types(x.dtype, v.dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using V = decltype(v_type);
    using A = arith<X>;
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A d = dt.at<A>(b);
      each(n, [=](X& x, V v) { x = store<X>(euler<A>(load(x), load(v), d)); }, line<X>(x, b, c, h, w), line<V>(v, b, c, h, w));
    });
  });
}

// Reads x, v1 and v2, writes x: 4 C elements a pixel.
template <> void rk2_stage(Cpu, Shape s, View x, View v1, View v2, Step dt, double b1, double b2) {
  by_types(x.dtype, v1.dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using V = decltype(v_type);
    using A = arith<X>;
    A a1 = b1, a2 = b2;
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A d = dt.at<A>(b);
      each(n, [=](X& x, V v1, V v2) { x = store<X>(rk2<A>(load(x), load(v1), load(v2), a1, a2, d)); },
           line<X>(x, b, c, h, w), line<V>(v1, b, c, h, w), line<V>(v2, b, c, h, w));
    });
  });
}

// Reads x_0, x_lr and v, writes x_t and x_lr: 5 C elements a pixel.
template <> void student_state(Cpu, Shape s, View x_in, View v, PerImage<float> t, View out) {
  by_types(x_in.dtype, v.dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using V = decltype(v_type);
    using A = arith<X>;
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A d = t[b];
      each(n, [=](X x_0, V v, X lr, X& x_t, X& copy) {
        x_t = store<X>(euler<A>(load(x_0), load(v), d));
        copy = lr;
      }, line<X>(x_in, b, c, h, w), line<V>(v, b, c, h, w), line<X>(x_in, b, c + s.C, h, w), line<X>(out, b, c, h, w), line<X>(out, b, c + s.C, h, w));
    });
  });
}

// slope[i] = sum_j coefficient_j k_j[i], from left to right, in a strip that stays in the cache.
template <class V, class A> static void combine(const Sum& sum, int64_t b, int64_t c, int64_t h, int64_t w, int64_t n, A* slope) {
  for (int j = 0; j < sum.n; j++) {
    A a = sum.coefficient[j];
    if (j == 0) each(n, [=](A& y, V v) { y = load(v) * a; }, Line<A>{slope, 1}, line<V>(sum.k[j], b, c, h, w));
    else each(n, [=](A& y, V v) { y = y + load(v) * a; }, Line<A>{slope, 1}, line<V>(sum.k[j], b, c, h, w));
  }
}

// Reads x_t and the velocities that count, writes x.
template <> void dopri5_stage(Cpu, Shape s, View x, View x_t, const Sum& sum, double dt) {
  by_types(x.dtype, sum.k[0].dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using A = arith<X>;
    A d = dt;
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A slope[STRIP];
      combine<decltype(v_type), A>(sum, b, c, h, w, n, slope);
      each(n, [=](X& x, X x_t, A slope) { x = store<X>(euler<A>(load(x_t), slope, d)); }, line<X>(x, b, c, h, w), line<X>(x_t, b, c, h, w), Line<A>{slope, 1});
    });
  });
}

// A strip's sum goes to `partial`, and the partial sums are added in their order: the same bits on any number of threads.
template <> void dopri5_error(Cpu, Shape s, View x, View x_t, const Sum& sum, double dt, double atol, double rtol, double*, double* out) {
  std::vector<double> partial(count_strips(s));
  by_types(x.dtype, sum.k[0].dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using A = arith<X>;
    A d = dt, a = atol, r = rtol;
    for_strips(s, [&](int64_t i, int64_t b, int64_t h, int64_t w, int64_t n) {
      A slope[STRIP];
      double total = 0;
      for (int64_t c = 0; c < s.C; c++) {
        combine<decltype(v_type), A>(sum, b, c, h, w, n, slope);
        each(n, [=](A& y, X x_t, X x) { y = dopri5_ratio<A>(y, d, load(x_t), load(x), a, r); }, Line<A>{slope, 1}, line<X>(x_t, b, c, h, w), line<X>(x, b, c, h, w));
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < n; j++) total += double(slope[j]) * slope[j];
      }
      partial[i] = total;
    });
  });
  double total = 0;
  for (double p : partial) total += p;
  *out = sqrt(total / double(s.B * s.C * s.H * s.W));
}

// ---- distillation

// Reads v_phi and v_theta, writes the target: 3 C elements a pixel.
template <> void distill_target(Cpu, Shape s, View v_phi, View v_theta, PerImage<float> t, PerImage<float> end, View out) {
  by_type(v_phi.dtype, [&](auto type) {
    using T = decltype(type);
    using A = arith<T>;
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A weight = (A(end[b]) - A(t[b])) / A(end[b]);
      each(n, [=](T v, T u, T& y) { y = store<T>(target<A>(load(v), load(u), weight)); }, line<T>(v_phi, b, c, h, w), line<T>(v_theta, b, c, h, w), line<T>(out, b, c, h, w));
    });
  });
}

// Reads 6 C elements a pixel (v_phi at t, s and 0; v_step; v_theta at t and 0), writes three numbers.
template <> void distill_loss(Cpu, Shape s, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> end, double*, void* out) {
  std::vector<double> partial(3 * count_strips(s));
  double count = double(s.B * s.C * s.H * s.W), total[3] = {};
  by_type(v_phi.dtype, [&](auto type) {
    using T = decltype(type);
    using A = arith<T>;
    for_strips(s, [&](int64_t i, int64_t b, int64_t h, int64_t w, int64_t n) {
      A tb = t[b], weight = (A(end[b]) - A(t[b])) / A(end[b]), r[3][STRIP];
      for (int64_t c = 0; c < s.C; c++) {
        each(n, [=](T v_t, T v_s, T v_0, T v_step, T u_t, T u_0, A& r0, A& r1, A& r2) {
          Residuals<A> r = residuals<A>(load(v_t), load(v_s), load(v_0), load(v_step), load(u_t), load(u_0), tb, weight);
          r0 = r.distill, r1 = r.align, r2 = r.start;
        }, line<T>(v_phi, b, c, h, w), line<T>(v_phi, b + s.B, c, h, w), line<T>(v_phi, b + 2 * s.B, c, h, w), line<T>(v_step, b, c, h, w),
           line<T>(v_theta, b, c, h, w), line<T>(v_theta, b + s.B, c, h, w), Line<A>{r[0], 1}, Line<A>{r[1], 1}, Line<A>{r[2], 1});
        for (int k = 0; k < 3; k++) {
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < n; j++) sum += double(r[k][j]) * r[k][j];
          partial[3 * i + k] += sum;
        }
      }
    });
    for (size_t i = 0; i < partial.size(); i++) total[i % 3] += partial[i];
    for (int k = 0; k < 3; k++) static_cast<A*>(out)[k] = A(total[k] / count);
  });
}

// Reads the same 6 C elements a pixel and writes the gradient of v_phi, 3 C: d(mean r^2) = 2 r dr / count.
template <> void distill_loss_backward(Cpu, Shape s, const void* grad, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> end, View out) {
  double count = double(s.B * s.C * s.H * s.W);
  by_type(v_phi.dtype, [&](auto type) {
    using T = decltype(type);
    using A = arith<T>;
    const A* g = static_cast<const A*>(grad);
    A g0 = A(2 * g[0] / count), g1 = A(2 * g[1] / count), g2 = A(2 * g[2] / count);
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      A tb = t[b], weight = (A(end[b]) - A(t[b])) / A(end[b]);
      each(n, [=](T v_t, T v_s, T v_0, T v_step, T u_t, T u_0, T& d_t, T& d_s, T& d_0) {
        Residuals<A> r = residuals<A>(load(v_t), load(v_s), load(v_0), load(v_step), load(u_t), load(u_0), tb, weight);
        d_t = store<T>(r.align * (A(1) - tb) * g1);
        d_s = store<T>(r.distill * g0);
        d_0 = store<T>(r.start * g2);
      }, line<T>(v_phi, b, c, h, w), line<T>(v_phi, b + s.B, c, h, w), line<T>(v_phi, b + 2 * s.B, c, h, w), line<T>(v_step, b, c, h, w),
         line<T>(v_theta, b, c, h, w), line<T>(v_theta, b + s.B, c, h, w),
         line<T>(out, b, c, h, w), line<T>(out, b + s.B, c, h, w), line<T>(out, b + 2 * s.B, c, h, w));
    });
  });
}

// ---- pictures

// Reads C elements a pixel, writes C bytes, channels last; in two loops, so that the arithmetic is on neighbours.
template <> void to_uint8(Cpu, Shape s, View x, uint8_t* out) {
  by_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_lines(s, [&](int64_t b, int64_t c, int64_t h, int64_t w, int64_t n) {
      uint8_t strip[STRIP], *pixels = out + ((b * s.H + h) * s.W + w) * s.C + c;
      each(n, [](T x, uint8_t& y) { y = to_byte(load(x)); }, line<T>(x, b, c, h, w), Line<uint8_t>{strip, 1});
      each(n, [](uint8_t byte, uint8_t& y) { y = byte; }, Line<uint8_t>{strip, 1}, Line<uint8_t>{pixels, s.C});
    });
  });
}

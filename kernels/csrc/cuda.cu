// The elementwise kernels on the GPU: launches only, the formulas are flow.h's. As on the CPU a picture is walked in
// strips of one row, and a block of threads takes one strip at a time; neighbouring threads take neighbouring
// pixels, so that a warp's 32 reads are one stretch of memory, and a thread takes all channels of its pixel, so
// that several reads are under way at once. Nothing is read twice: the memory's bandwidth is the limit.
#include <algorithm>

#include "launch.h"

constexpr int THREADS = 256;
constexpr int64_t STRIP = 1024;

struct Strips {
  Shape s;
  int64_t in_row, count;
  explicit Strips(Shape s) : s(s), in_row((s.W + STRIP - 1) / STRIP), count(s.B * s.H * in_row) {}
};

// f(b, h, w) for each pixel of the strips of this block.
template <class F> __device__ void for_pixels(const Strips& strips, F f) {
  for (int64_t i = blockIdx.x; i < strips.count; i += gridDim.x) {
    int64_t first = i % strips.in_row * STRIP, h = i / strips.in_row % strips.s.H, b = i / strips.in_row / strips.s.H;
    int64_t end = first + STRIP < strips.s.W ? first + STRIP : strips.s.W;
    for (int64_t w = first + threadIdx.x; w < end; w += blockDim.x) f(b, h, w);
  }
}

template <class Kernel> __global__ void __launch_bounds__(THREADS) run(Strips strips, Kernel kernel) { for_pixels(strips, kernel); }

// kernel(b, h, w) for every pixel, a thread each.
template <class Kernel> static void each_pixel(Cuda device, Shape s, Kernel kernel) {
  Strips strips(s);
  launch(device, run<Kernel>, std::min(strips.count, most_blocks()), dim3(THREADS), strips, kernel);
}

template <class T> __device__ T& at(const View& v, int64_t b, int64_t c, int64_t h, int64_t w) { return v.at<T>(b, c, h)[w * v.w]; }

// ---- noise

// f(c, eps) for the channels of one pixel: four channels a draw.
template <class F> __device__ void with_noise(int64_t C, int64_t seed, uint32_t stream, int64_t h, int64_t w, F f) {
  for (int64_t c = 0; c < C; c += 4) {
    float eps[4];
    draw(seed, stream, c / 4, h, w, eps[0], eps[1], eps[2], eps[3]);
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (c + k < C) f(c + k, eps[k]);
  }
}

struct Normal {
  Shape s;
  PerImage<int64_t> seeds;
  uint32_t stream;
  Corner corner;
  float* out;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    with_noise(s.C, seeds[b], stream, h + corner.h, w + corner.w, [&](int64_t c, float eps) { out[((b * s.C + c) * s.H + h) * s.W + w] = eps; });
  }
};

template <> void normal(Cuda device, Shape s, PerImage<int64_t> seeds, uint32_t stream, Corner corner, float* out) { each_pixel(device, s, Normal{s, seeds, stream, corner, out}); }

template <class T> struct NoiseAugment {
  int64_t C;
  View x_lr, x_in;
  arith<T> signal, sigma_p;
  PerImage<int64_t> seeds;
  Corner corner;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    with_noise(C, seeds[b], 0, h + corner.h, w + corner.w, [&](int64_t c, float eps) {
      T lr = at<T>(x_lr, b, c, h, w);
      at<T>(x_in, b, c, h, w) = store<T>(perturb<arith<T>>(load(lr), eps, signal, sigma_p));
      at<T>(x_in, b, c + C, h, w) = lr;
    });
  }
};

template <> void noise_augment(Cuda device, Shape s, View x_lr, double sigma_p, PerImage<int64_t> seeds, Corner corner, View x_in) {
  by_type(x_lr.dtype, [&](auto type) {
    using T = decltype(type);
    each_pixel(device, s, NoiseAugment<T>{s.C, x_lr, x_in, arith<T>(sqrt(1 - sigma_p * sigma_p)), arith<T>(sigma_p), seeds, corner});
  });
}

template <class T> struct TrainingPair {
  int64_t C;
  View x_1, x_lr, x_in, velocity;
  arith<T> signal, sigma_p;
  PerImage<float> t;
  PerImage<int64_t> seeds;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<T>;
    with_noise(C, seeds[b], 0, h, w, [&](int64_t c, float eps) {
      T lr = at<T>(x_lr, b, c, h, w);
      A hr = load(at<T>(x_1, b, c, h, w)), x_0 = perturb<A>(load(lr), eps, signal, sigma_p);
      at<T>(x_in, b, c, h, w) = store<T>(on_path<A>(x_0, hr, A(t[b])));
      at<T>(x_in, b, c + C, h, w) = lr;
      at<T>(velocity, b, c, h, w) = store<T>(hr - x_0);
    });
  }
};

template <> void flow_training_pair(Cuda device, Shape s, View x_1, View x_lr, PerImage<float> t, double sigma_p, PerImage<int64_t> seeds, View x_in, View velocity) {
  by_type(x_lr.dtype, [&](auto type) {
    using T = decltype(type);
    each_pixel(device, s, TrainingPair<T>{s.C, x_1, x_lr, x_in, velocity, arith<T>(sqrt(1 - sigma_p * sigma_p)), arith<T>(sigma_p), t, seeds});
  });
}

// ---- solver steps

template <class X, class V> struct EulerStep {
  int64_t C;
  View x, v;
  Step dt;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<X>;
    A d = dt.at<A>(b);
    for (int64_t c = 0; c < C; c++) {
      X& y = at<X>(x, b, c, h, w);
      y = store<X>(euler<A>(load(y), load(at<V>(v, b, c, h, w)), d));
    }
  }
};

template <> void euler_step(Cuda device, Shape s, View x, View v, Step dt) {
  by_types(x.dtype, v.dtype, [&](auto x_type, auto v_type) { each_pixel(device, s, EulerStep<decltype(x_type), decltype(v_type)>{s.C, x, v, dt}); });
}

template <class X, class V> struct Rk2Stage {
  int64_t C;
  View x, v1, v2;
  Step dt;
  arith<X> b1, b2;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<X>;
    A d = dt.at<A>(b);
    for (int64_t c = 0; c < C; c++) {
      X& y = at<X>(x, b, c, h, w);
      y = store<X>(rk2<A>(load(y), load(at<V>(v1, b, c, h, w)), load(at<V>(v2, b, c, h, w)), b1, b2, d));
    }
  }
};

template <> void rk2_stage(Cuda device, Shape s, View x, View v1, View v2, Step dt, double b1, double b2) {
  by_types(x.dtype, v1.dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    each_pixel(device, s, Rk2Stage<X, decltype(v_type)>{s.C, x, v1, v2, dt, arith<X>(b1), arith<X>(b2)});
  });
}

template <class X, class V> struct StudentState {
  int64_t C;
  View x_in, v, out;
  PerImage<float> t;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<X>;
    for (int64_t c = 0; c < C; c++) {
      at<X>(out, b, c, h, w) = store<X>(euler<A>(load(at<X>(x_in, b, c, h, w)), load(at<V>(v, b, c, h, w)), A(t[b])));
      at<X>(out, b, c + C, h, w) = at<X>(x_in, b, c + C, h, w);
    }
  }
};

template <> void student_state(Cuda device, Shape s, View x_in, View v, PerImage<float> t, View out) {
  by_types(x_in.dtype, v.dtype, [&](auto x_type, auto v_type) { each_pixel(device, s, StudentState<decltype(x_type), decltype(v_type)>{s.C, x_in, v, out, t}); });
}

// sum_j coefficient_j k_j at one element, from left to right.
template <class V, class A> __device__ A combine(const Sum& sum, int64_t b, int64_t c, int64_t h, int64_t w) {
  A slope = load(at<V>(sum.k[0], b, c, h, w)) * A(sum.coefficient[0]);
  for (int j = 1; j < sum.n; j++) slope = slope + load(at<V>(sum.k[j], b, c, h, w)) * A(sum.coefficient[j]);
  return slope;
}

template <class X, class V> struct Dopri5Stage {
  int64_t C;
  View x, x_t;
  Sum sum;
  arith<X> dt;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<X>;
    for (int64_t c = 0; c < C; c++) at<X>(x, b, c, h, w) = store<X>(euler<A>(load(at<X>(x_t, b, c, h, w)), combine<V, A>(sum, b, c, h, w), dt));
  }
};

template <> void dopri5_stage(Cuda device, Shape s, View x, View x_t, const Sum& sum, double dt) {
  by_types(x.dtype, sum.k[0].dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    each_pixel(device, s, Dopri5Stage<X, decltype(v_type)>{s.C, x, x_t, sum, arith<X>(dt)});
  });
}

// ---- sums over all pixels: each thread adds up its own in double, a block its threads', and one more block the
// blocks'. The order depends on sizes alone, so the bits repeat; no atomics.

// The sum over the block's threads, in thread 0.
__device__ double block_sum(double x) {
  __shared__ double shared[THREADS];
  shared[threadIdx.x] = x;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  double sum = shared[0];
  __syncthreads();
  return sum;
}

// kernel(b, h, w, totals) adds to K totals; the block's go to partial[k * PARTIAL_SUMS + block].
template <int K, class Kernel> __global__ void __launch_bounds__(THREADS) sum_pixels(Strips strips, Kernel kernel, double* partial) {
  double total[K] = {};
  for_pixels(strips, [&](int64_t b, int64_t h, int64_t w) { kernel(b, h, w, total); });
  for (int k = 0; k < K; k++) {
    double sum = block_sum(total[k]);
    if (threadIdx.x == 0) partial[k * PARTIAL_SUMS + blockIdx.x] = sum;
  }
}

// out[k] = finish(sum of the k-th partial sums / count)
template <int K, class Out> __global__ void __launch_bounds__(THREADS) finish_mean(const double* partial, int64_t blocks, double count, bool root, Out* out) {
  for (int k = 0; k < K; k++) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += THREADS) total += partial[k * PARTIAL_SUMS + i];
    double mean = block_sum(total) / count;
    if (threadIdx.x == 0) out[k] = Out(root ? sqrt(mean) : mean);
  }
}

template <int K, class Out, class Kernel> static void mean_of_pixels(Cuda device, Shape s, Kernel kernel, bool root, double* partial, Out* out) {
  Strips strips(s);
  int64_t blocks = std::min(strips.count, PARTIAL_SUMS);
  launch(device, sum_pixels<K, Kernel>, blocks, dim3(THREADS), strips, kernel, partial);
  launch(device, finish_mean<K, Out>, 1, dim3(THREADS), (const double*)partial, blocks, double(s.B * s.C * s.H * s.W), root, out);
}

template <class X, class V> struct Dopri5Error {
  int64_t C;
  View x, x_t;
  Sum sum;
  arith<X> dt, atol, rtol;
  __device__ void operator()(int64_t b, int64_t h, int64_t w, double* total) const {
    using A = arith<X>;
    for (int64_t c = 0; c < C; c++) {
      double r = dopri5_ratio<A>(combine<V, A>(sum, b, c, h, w), dt, load(at<X>(x_t, b, c, h, w)), load(at<X>(x, b, c, h, w)), atol, rtol);
      total[0] += r * r;
    }
  }
};

template <> void dopri5_error(Cuda device, Shape s, View x, View x_t, const Sum& sum, double dt, double atol, double rtol, double* partial, double* out) {
  by_types(x.dtype, sum.k[0].dtype, [&](auto x_type, auto v_type) {
    using X = decltype(x_type);
    using A = arith<X>;
    mean_of_pixels<1>(device, s, Dopri5Error<X, decltype(v_type)>{s.C, x, x_t, sum, A(dt), A(atol), A(rtol)}, true, partial, out);
  });
}

// ---- distillation

template <class T> struct DistillTarget {
  int64_t C;
  View v_phi, v_theta, out;
  PerImage<float> t, s;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<T>;
    A weight = (A(s[b]) - A(t[b])) / A(s[b]);
    for (int64_t c = 0; c < C; c++) at<T>(out, b, c, h, w) = store<T>(target<A>(load(at<T>(v_phi, b, c, h, w)), load(at<T>(v_theta, b, c, h, w)), weight));
  }
};

template <> void distill_target(Cuda device, Shape size, View v_phi, View v_theta, PerImage<float> t, PerImage<float> s, View out) {
  by_type(v_phi.dtype, [&](auto type) { each_pixel(device, size, DistillTarget<decltype(type)>{size.C, v_phi, v_theta, out, t, s}); });
}

template <class T> struct Distillation {
  Shape size;
  View v_phi, v_step, v_theta;
  PerImage<float> t, s;
  __device__ Residuals<arith<T>> residuals_at(int64_t b, int64_t c, int64_t h, int64_t w) const {
    using A = arith<T>;
    int64_t B = size.B;
    return residuals<A>(load(at<T>(v_phi, b, c, h, w)), load(at<T>(v_phi, b + B, c, h, w)), load(at<T>(v_phi, b + 2 * B, c, h, w)), load(at<T>(v_step, b, c, h, w)),
                        load(at<T>(v_theta, b, c, h, w)), load(at<T>(v_theta, b + B, c, h, w)), A(t[b]), (A(s[b]) - A(t[b])) / A(s[b]));
  }
};

template <class T> struct DistillLoss : Distillation<T> {
  __device__ void operator()(int64_t b, int64_t h, int64_t w, double* total) const {
    for (int64_t c = 0; c < this->size.C; c++) {
      Residuals<arith<T>> r = this->residuals_at(b, c, h, w);
      total[0] += double(r.distill) * r.distill;
      total[1] += double(r.align) * r.align;
      total[2] += double(r.start) * r.start;
    }
  }
};

template <> void distill_loss(Cuda device, Shape size, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> s, double* partial, void* out) {
  by_type(v_phi.dtype, [&](auto type) {
    using T = decltype(type);
    mean_of_pixels<3>(device, size, DistillLoss<T>{{size, v_phi, v_step, v_theta, t, s}}, false, partial, static_cast<arith<T>*>(out));
  });
}

template <class T> struct DistillLossBackward : Distillation<T> {
  const arith<T>* grad;
  View out;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    using A = arith<T>;
    int64_t B = this->size.B;
    double count = double(B * this->size.C * this->size.H * this->size.W);
    for (int64_t c = 0; c < this->size.C; c++) {
      Residuals<A> r = this->residuals_at(b, c, h, w);
      at<T>(out, b, c, h, w) = store<T>(r.align * (A(1) - A(this->t[b])) * A(2 * grad[1] / count));
      at<T>(out, b + B, c, h, w) = store<T>(r.distill * A(2 * grad[0] / count));
      at<T>(out, b + 2 * B, c, h, w) = store<T>(r.start * A(2 * grad[2] / count));
    }
  }
};

template <> void distill_loss_backward(Cuda device, Shape size, const void* grad, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> s, View out) {
  by_type(v_phi.dtype, [&](auto type) {
    using T = decltype(type);
    each_pixel(device, size, DistillLossBackward<T>{{size, v_phi, v_step, v_theta, t, s}, static_cast<const arith<T>*>(grad), out});
  });
}

// ---- pictures

template <class T> struct ToBytes {
  Shape s;
  View x;
  uint8_t* out;
  __device__ void operator()(int64_t b, int64_t h, int64_t w) const {
    for (int64_t c = 0; c < s.C; c++) out[((b * s.H + h) * s.W + w) * s.C + c] = to_byte(load(at<T>(x, b, c, h, w)));
  }
};

template <> void to_uint8(Cuda device, Shape s, View x, uint8_t* out) {
  by_type(x.dtype, [&](auto type) { each_pixel(device, s, ToBytes<decltype(type)>{s, x, out}); });
}

// GroupNorm, scale-shift and SiLU on the GPU, in the two trips of cpu_norm.cpp: sums for each channel and chunk of
// pixels, a few numbers for each group, then one elementwise pass. A block of 32 x 8 threads takes a chunk of
// pixels of some channels, with threadIdx.x along whatever is contiguous: channels (LAST) or pixels.
#include "launch.h"
#include "norm.h"

constexpr int WIDE = 32, HIGH = 8, THREADS = WIDE * HIGH;

// Which chunk, channels and pixels a thread has.
template <bool LAST> struct Tile {
  static constexpr int CHANNELS = LAST ? WIDE : HIGH, LANES = LAST ? HIGH : WIDE;
  int64_t b, chunk, c, first, end;
  int channel, lane;
  __device__ explicit Tile(const Norm& a) {
    Chunks chunks(a.P);
    int64_t tiles = (a.C + CHANNELS - 1) / CHANNELS, i = blockIdx.x;
    channel = LAST ? threadIdx.x : threadIdx.y;
    lane = LAST ? threadIdx.y : threadIdx.x;
    c = i % tiles * CHANNELS + channel;
    chunk = i / tiles % chunks.count;
    b = i / tiles / chunks.count;
    first = chunk * chunks.pixels;
    end = first + chunks.size(chunk, a.P);
  }
  static int64_t blocks(const Norm& a) { return a.B * Chunks(a.P).count * ((a.C + CHANNELS - 1) / CHANNELS); }
};

template <bool LAST, class T> __device__ T& at(const View& v, int64_t b, int64_t c, int64_t p) {
  return static_cast<T*>(v.data)[b * v.b + (LAST ? p * v.w + c : c * v.c + p)];
}

// The two sums of each channel over its lanes, in lane 0.
template <bool LAST, class A> __device__ void sum_lanes(const Tile<LAST>& tile, A& s0, A& s1) {
  __shared__ A shared[2][Tile<LAST>::CHANNELS][Tile<LAST>::LANES + 1];  // + 1: neighbours in other banks
  shared[0][tile.channel][tile.lane] = s0;
  shared[1][tile.channel][tile.lane] = s1;
  __syncthreads();
  if (tile.lane) return;
  for (int i = 1; i < Tile<LAST>::LANES; i++) {
    s0 += shared[0][tile.channel][i];
    s1 += shared[1][tile.channel][i];
  }
}

// Where the two numbers of a chunk and channel lie in the working memory.
__device__ int64_t chunk_slot(const Norm& a, int64_t b, int64_t chunk, int64_t c) { return 2 * ((b * Chunks(a.P).count + chunk) * a.C + c); }

template <bool LAST, class T> __global__ void __launch_bounds__(THREADS) chunk_statistics(Norm a, double* work) {
  using A = arith<T>;
  Tile<LAST> tile(a);
  bool inside = tile.c < a.C;
  __shared__ A early[Tile<LAST>::CHANNELS][PIVOT_PIXELS];
  int64_t n = tile.end - tile.first, pivots = n < PIVOT_PIXELS ? n : PIVOT_PIXELS;
  if (inside && tile.lane < pivots) early[tile.channel][tile.lane] = load(at<LAST, T>(a.x, tile.b, tile.c, tile.first + tile.lane));
  __syncthreads();
  A pivot = 0, sum = 0, squares = 0;
  if (inside) {
    for (int i = 0; i < pivots; i++) pivot += early[tile.channel][i] / A(pivots);
    for (int64_t p = tile.first + tile.lane; p < tile.end; p += Tile<LAST>::LANES) {
      A d = load(at<LAST, T>(a.x, tile.b, tile.c, p)) - pivot;
      sum += d;
      squares += d * d;
    }
  }
  sum_lanes(tile, sum, squares);
  if (!inside || tile.lane) return;
  Moments m = Moments::about(pivot, n, sum, squares);
  int64_t slot = chunk_slot(a, tile.b, tile.chunk, tile.c);
  work[slot] = m.mean;
  work[slot + 1] = m.m2;
}

// One block a group: its threads merge chunks and channels, then one another.
template <class A> __global__ void __launch_bounds__(THREADS) group_statistics(Norm a, double eps, const double* work) {
  Chunks chunks(a.P);
  int64_t D = a.C / a.G, b = blockIdx.x / a.G, g = blockIdx.x % a.G;
  Moments all{};
  for (int64_t i = threadIdx.x; i < chunks.count * D; i += THREADS) {
    int64_t slot = chunk_slot(a, b, i / D, g * D + i % D);
    all.merge({double(chunks.size(i / D, a.P)), work[slot], work[slot + 1]});
  }
  __shared__ Moments shared[THREADS];
  shared[threadIdx.x] = all;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x].merge(shared[threadIdx.x + half]);
  }
  if (threadIdx.x) return;
  static_cast<A*>(a.mean)[blockIdx.x] = A(shared[0].mean);
  static_cast<A*>(a.rstd)[blockIdx.x] = A(shared[0].rstd(eps));
}

template <bool LAST, class T> __global__ void __launch_bounds__(THREADS) normalise(Norm a, View y) {
  using A = arith<T>;
  Tile<LAST> tile(a);
  if (tile.c >= a.C) return;
  Channel<A> k = channel<A>(a, tile.b, tile.c);
  for (int64_t p = tile.first + tile.lane; p < tile.end; p += Tile<LAST>::LANES)
    at<LAST, T>(y, tile.b, tile.c, p) = store<T>(silu((load(at<LAST, T>(a.x, tile.b, tile.c, p)) - k.mean) * k.gain + k.offset));
}

template <bool LAST, class T> __global__ void __launch_bounds__(THREADS) chunk_gradients(Norm a, View dy, double* work) {
  using A = arith<T>;
  Tile<LAST> tile(a);
  bool inside = tile.c < a.C;
  A s0 = 0, s1 = 0;
  if (inside) {
    Channel<A> k = channel<A>(a, tile.b, tile.c);
    for (int64_t p = tile.first + tile.lane; p < tile.end; p += Tile<LAST>::LANES) {
      A d = load(at<LAST, T>(a.x, tile.b, tile.c, p)) - k.mean, du = load(at<LAST, T>(dy, tile.b, tile.c, p)) * silu_slope(d * k.gain + k.offset);
      s0 += du;
      s1 += du * d;
    }
  }
  sum_lanes(tile, s0, s1);
  if (!inside || tile.lane) return;
  int64_t slot = chunk_slot(a, tile.b, tile.chunk, tile.c);
  work[slot] = s0;
  work[slot + 1] = s1;
}

// What the backward pass keeps besides the chunks' sums: for each picture, its channels' share of the gradients of
// weight and bias, and its groups' slope and level.
struct Kept {
  double *weight, *bias, *slope, *level;
  __host__ __device__ Kept(const Norm& a, double* work) {
    weight = work + 2 * a.B * a.C * Chunks(a.P).count;
    bias = weight + a.B * a.C;
    slope = bias + a.B * a.C;
    level = slope + a.B * a.C;
  }
};

// One block a group: the chunks' sums of its channels to the gradients of the parameters, and to slope and level.
template <class A> __global__ void __launch_bounds__(THREADS) group_gradients(Norm a, double* work, A* dscale, A* dshift) {
  __shared__ double shared[2][THREADS];
  int64_t D = a.C / a.G, b = blockIdx.x / a.G, g = blockIdx.x % a.G, chunks = Chunks(a.P).count;
  Kept kept(a, work);
  double gain_du = 0, gain_dux = 0;
  for (int64_t c = g * D; c < (g + 1) * D; c++) {
    double du = 0, dux = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS) {
      int64_t slot = chunk_slot(a, b, i, c);
      du += work[slot];
      dux += work[slot + 1];
    }
    shared[0][threadIdx.x] = du;
    shared[1][threadIdx.x] = dux;
    for (int half = THREADS / 2; half; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) {
        shared[0][threadIdx.x] += shared[0][threadIdx.x + half];
        shared[1][threadIdx.x] += shared[1][threadIdx.x + half];
      }
    }
    if (threadIdx.x == 0) {
      du = shared[0][0], dux = shared[1][0];
      double gain = channel<A>(a, b, c).gain;
      gain_du += gain * du;
      gain_dux += gain * dux;
      Gradients d = parameter_gradients<A>(a, b, c, du, dux);
      kept.weight[b * a.C + c] = d.weight;
      kept.bias[b * a.C + c] = d.bias;
      if (dscale) dscale[b * a.C + c] = A(d.scale), dshift[b * a.C + c] = A(d.shift);
    }
    __syncthreads();
  }
  if (threadIdx.x) return;
  A slope, level;
  through_statistics(a, b, g, gain_du, gain_dux, slope, level);
  kept.slope[blockIdx.x] = slope;
  kept.level[blockIdx.x] = level;
}

template <bool LAST, class T> __global__ void __launch_bounds__(THREADS) input_gradient(Norm a, View dy, View dx, double* work) {
  using A = arith<T>;
  Tile<LAST> tile(a);
  if (tile.c >= a.C) return;
  Channel<A> k = channel<A>(a, tile.b, tile.c);
  Kept kept(a, work);
  int64_t group = tile.b * a.G + tile.c / (a.C / a.G);
  k.slope = A(kept.slope[group]);
  k.level = A(kept.level[group]);
  for (int64_t p = tile.first + tile.lane; p < tile.end; p += Tile<LAST>::LANES) {
    A d = load(at<LAST, T>(a.x, tile.b, tile.c, p)) - k.mean, du = load(at<LAST, T>(dy, tile.b, tile.c, p)) * silu_slope(d * k.gain + k.offset);
    at<LAST, T>(dx, tile.b, tile.c, p) = store<T>(k.gain * du + d * k.slope + k.level);
  }
}

// The pictures' shares of the gradients of weight and bias, added up: a thread a channel.
template <class A> __global__ void __launch_bounds__(THREADS) sum_pictures(Norm a, double* work, A* dweight, A* dbias) {
  int64_t c = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (c >= a.C) return;
  Kept kept(a, work);
  double weight = 0, bias = 0;
  for (int64_t b = 0; b < a.B; b++) {
    weight += kept.weight[b * a.C + c];
    bias += kept.bias[b * a.C + c];
  }
  dweight[c] = A(weight);
  dbias[c] = A(bias);
}

template <bool LAST, class T> static void forward(Cuda device, const Norm& a, double eps, double* work, View y) {
  dim3 threads(WIDE, HIGH);
  launch(device, chunk_statistics<LAST, T>, Tile<LAST>::blocks(a), threads, a, work);
  launch(device, group_statistics<arith<T>>, a.B * a.G, dim3(THREADS), a, eps, (const double*)work);
  launch(device, normalise<LAST, T>, Tile<LAST>::blocks(a), threads, a, y);
}

template <bool LAST, class T> static void backward(Cuda device, const Norm& a, View dy, double* work, View dx, void* dweight, void* dbias, void* dscale, void* dshift) {
  using A = arith<T>;
  dim3 threads(WIDE, HIGH);
  launch(device, chunk_gradients<LAST, T>, Tile<LAST>::blocks(a), threads, a, dy, work);
  launch(device, group_gradients<A>, a.B * a.G, dim3(THREADS), a, work, static_cast<A*>(dscale), static_cast<A*>(dshift));
  launch(device, input_gradient<LAST, T>, Tile<LAST>::blocks(a), threads, a, dy, dx, work);
  launch(device, sum_pictures<A>, (a.C + THREADS - 1) / THREADS, dim3(THREADS), a, work, static_cast<A*>(dweight), static_cast<A*>(dbias));
}

template <> void group_norm_silu(Cuda device, const Norm& a, double eps, double* work, View y) {
  by_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    a.x.c == 1 ? forward<true, T>(device, a, eps, work, y) : forward<false, T>(device, a, eps, work, y);
  });
}

template <> void group_norm_silu_backward(Cuda device, const Norm& a, View dy, double* work, View dx, void* dweight, void* dbias, void* dscale, void* dshift) {
  by_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    a.x.c == 1 ? backward<true, T>(device, a, dy, work, dx, dweight, dbias, dscale, dshift)
               : backward<false, T>(device, a, dy, work, dx, dweight, dbias, dscale, dshift);
  });
}

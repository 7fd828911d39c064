// The U-Net's 3x3 convolution on the CPU by Winograd's algorithm F(4x4, 3x3) (Lavin and Gray 2016): a tile
// of 4x4 outputs takes 36 multiplications per pair of channels, not 144,
//   Y = A^T [ (G g G^T) * (B^T d B) ] A    of the kernel g (3x3) and the input d (6x6) around the tile,
// and as the bracket is summed over the input's channels, each of its 36 positions is one matrix product over many tiles.
// A block of tiles goes through all three steps in a core's cache. Memory is channels_last: vectors run along channels. What is read
// jumps too often for the processor to guess what comes next, so each step asks for it ahead (__builtin_prefetch).
// The gradient of g goes the same way backwards: G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G.
// In bf16, which is for inference alone, what lies in memory has 16 bits, U = G g G^T and V = B^T d B too: the products take half
// the time (AVX-512's instruction for pairs of channels). Transforms and sums are in float32.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "kernels.h"

using torch::stable::parallel_for;

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int ROWS = LANES == 16 ? 12 : 6, COLUMNS = 2 * LANES;  // of the matrix product's blocks, whose sums stay in registers: 24 of 32, 12 of 16
constexpr int64_t TILES = 3 * ROWS;                              // of a block
constexpr int64_t PIXELS = 8 * ROWS;                             // of a block of the 1x1 convolution
constexpr int GRADIENT_ROWS = LANES == 16 ? 8 : 4;               // which divide the channels
constexpr int64_t GRADIENT_TILES = 32, GRADIENT_ROOM = 1 << 17;  // at least so many tiles, whose V and N have about so many floats: half a megabyte, of a core's cache

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Values in a line of the cache. The 36 positions of what is transformed lie an odd number of lines apart: powers of two would share a
// few of the cache's sets.
template <class T> constexpr int64_t LINE = 64 / sizeof(T);

OFTSR Vector get(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
OFTSR void put(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
OFTSR Vector repeat(float a) { return a - Vector{}; }  // a + 0 would be an addition: it makes 0 of -0

#ifdef __AVX512BF16__
OFTSR Vector get(const bf16* p) { return Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16)); }
OFTSR void put(bf16* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(_mm512_cvtneps_pbh(__m512(v)))); }
#endif

OFTSR Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return Vector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return Vector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__ARM_NEON)
  return Vector(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

// c += a b, of numbers as they are stored: each lane of the operands holds one float, or two bf16, whose products are added.
template <class T> OFTSR Vector multiply_add(Vector a, Vector b, Vector c) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) return Vector(_mm512_dpbf16_ps(__m512(c), __m512bh(a), __m512bh(b)));
#endif
  return fma(a, b, c);
}

// The points of the transforms are 0, inner, -inner, outer, -outer and infinity: in float32 the usual ones, in bf16 a pair that
// halves the error.
template <class T> constexpr float inner = 1;
template <class T> constexpr float outer = 2;
template <> constexpr float inner<bf16> = 0.625f;
template <> constexpr float outer<bf16> = 1.5f;

// The transforms of one column or row: G g, B^T d and A^T m; and the transposes of the first and the third, G^T u and A y.
OFTSR void kernel_points(const Vector* g, Vector* out) {
  Vector a = g[0], b = g[1], c = g[2], even = a * (1.f / 24) + c * (1.f / 6), odd = b * (1.f / 12);
  out[0] = a * 0.25f;
  out[1] = (a + b + c) * (-1.f / 6);
  out[2] = (a - b + c) * (-1.f / 6);
  out[3] = even + odd;
  out[4] = even - odd;
  out[5] = c;
}

template <class T> OFTSR void input_points(const Vector* d, Vector* out) {
  constexpr float A = inner<T> * inner<T>, B = outer<T> * outer<T>;
  Vector d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5];
  Vector even = fma(repeat(-B), d2, d4), odd = fma(repeat(-B), d1, d3), even2 = fma(repeat(-A), d2, d4), odd2 = fma(repeat(-A), d1, d3);
  out[0] = fma(repeat(A * B), d0, fma(repeat(-A - B), d2, d4));
  out[1] = fma(repeat(inner<T>), odd, even);
  out[2] = fma(repeat(-inner<T>), odd, even);
  out[3] = fma(repeat(outer<T>), odd2, even2);
  out[4] = fma(repeat(-outer<T>), odd2, even2);
  out[5] = fma(repeat(A * B), d1, fma(repeat(-A - B), d3, d5));
}

template <class T> OFTSR void output_values(const Vector* m, Vector* out) {
  constexpr float A = inner<T> * inner<T>, B = outer<T> * outer<T>;
  Vector sum = m[1] + m[2], difference = inner<T> * (m[1] - m[2]), sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum + sum2;
  out[1] = fma(repeat(outer<T>), difference2, difference);
  out[2] = fma(repeat(B), sum2, A * sum);
  out[3] = fma(repeat(B * outer<T>), difference2, A * difference) + m[5];
}

OFTSR void kernel_gradient(const Vector* u, Vector* out) {
  Vector sum = (u[1] + u[2]) * (-1.f / 6), sum2 = u[3] + u[4];
  out[0] = u[0] * 0.25f + sum + sum2 * (1.f / 24);
  out[1] = (u[2] - u[1]) * (1.f / 6) + (u[3] - u[4]) * (1.f / 12);
  out[2] = sum + sum2 * (1.f / 6) + u[5];
}

OFTSR void output_points(const Vector* y, Vector* out) {
  Vector even = y[0] + y[2], odd = y[1] + y[3], even2 = y[0] + 4 * y[2], odd2 = 2 * y[1] + 8 * y[3];
  out[0] = y[0];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = y[3];
}

// One of them along the columns and then along the rows, from load(row, column) of N x N to store(row, column, value) of M x M.
template <int N, int M, auto TRANSFORM, class Load, class Store> OFTSR void both_ways(Load load, Store store) {
  Vector half[M][N];
#pragma GCC unroll 6
  for (int j = 0; j < N; j++) {
    Vector in[N], out[M];
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) in[i] = load(i, j);
    TRANSFORM(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) half[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) {
    Vector out[M];
    TRANSFORM(half[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < M; j++) store(i, j, out[j]);
  }
}

// G g G^T of COLUMNS output channels, weight (O, 3, 3, C) from the first of them on, to U[36][C][COLUMNS], each of whose
// positions lies `stride` after the one before.
static void transform_kernels(const float* weight, int64_t C, float* U, int64_t stride) {
  for (int64_t c = 0; c < C; c += LANES) {
    float turned[9][LANES][COLUMNS];
    for (int o = 0; o < COLUMNS; o++)
      for (int k = 0; k < 9; k++)
        for (int lane = 0; lane < LANES; lane++) turned[k][lane][o] = weight[(o * 9 + k) * C + c + lane];
    for (int lane = 0; lane < LANES; lane++)
      for (int o = 0; o < COLUMNS; o += LANES)
        both_ways<3, 6, kernel_points>([&](int i, int j) { return get(&turned[i * 3 + j][lane][o]); },
                                       [&](int i, int j, Vector u) { put(U + (i * 6 + j) * stride + (c + lane) * COLUMNS + o, u); });
  }
}

// The same of the convolution that takes gradients back from O to C channels, of the kernels turned by 180 degrees: of COLUMNS
// of the C channels, from the first of them on, to U[36][O][COLUMNS].
static void transform_turned(const float* weight, int64_t C, int64_t O, float* U, int64_t stride) {
  for (int64_t o = 0; o < O; o++)
    for (int64_t c = 0; c < COLUMNS; c += LANES)
      both_ways<3, 6, kernel_points>([&](int i, int j) { return get(weight + (o * 9 + (2 - i) * 3 + 2 - j) * C + c); },
                                     [&](int i, int j, Vector u) { put(U + (i * 6 + j) * stride + o * COLUMNS + c, u); });
}

// A tile's 6x6 inputs: where its rows begin, and its columns in them; null and -1 beyond the picture, where there are zeros.
template <class T> struct Window {
  const T* row[6];
  int64_t column[6];
};

// B^T d B to V, each of whose 36 positions lies `stride` after the one before, and COLUMNS channels `panel` after those before.
template <bool INSIDE, class T> static void transform_input(const Window<T>& w, int64_t C, T* V, int64_t stride, int64_t panel) {
  for (int64_t c = 0; c < C; c += LANES) {
    T* out = V + c / COLUMNS * panel + c % COLUMNS;
    both_ways<6, 6, input_points<T>>([&](int i, int j) {
      if (!INSIDE && (!w.row[i] || w.column[j] < 0)) return Vector{};
      const T* in = w.row[i] + w.column[j] + c;
      __builtin_prefetch(in + 4 * C);  // of the next tile
      return get(in);
    }, [&](int i, int j, Vector v) { put(out + (i * 6 + j) * stride, v); });
  }
}

// M (R, COLUMNS), whose rows lie `stride` apart, = V (R, C) U (C, COLUMNS); with h, which lies like M and may be it, h + bias + that. As
// many values as U has come to the cache from `ahead`.
template <int R, class T> OFTSR void multiply(const T* V, const T* U, float* M, int64_t C, const T* ahead, int64_t stride = COLUMNS, const float* h = nullptr, const float* bias = nullptr) {
  constexpr int EACH = sizeof(float) / sizeof(T);  // channels in a lane
  const float *v_words = reinterpret_cast<const float*>(V), *u_words = reinterpret_cast<const float*>(U), *ahead_words = reinterpret_cast<const float*>(ahead);
  Vector sum[R][2] = {};
  for (int64_t c = 0; c < C / EACH; c++) {
    Vector u0 = get(u_words + c * COLUMNS), u1 = get(u_words + c * COLUMNS + LANES);
    for (int i = 0; i < COLUMNS; i += LINE<float>) __builtin_prefetch(ahead_words + c * COLUMNS + i);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      Vector v = repeat(v_words[r * C / EACH + c]);
      sum[r][0] = multiply_add<T>(v, u0, sum[r][0]);
      sum[r][1] = multiply_add<T>(v, u1, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    float* m = M + r * stride;
    put(m, h ? get(h + r * stride) + (sum[r][0] + get(bias)) : sum[r][0]);
    put(m + LANES, h ? get(h + r * stride + LANES) + (sum[r][1] + get(bias + LANES)) : sum[r][1]);
  }
}

// A^T m A + bias of COLUMNS channels, as much of the 4x4 as lies in the picture, to y (H, W, O) from the tile's corner on.
template <class T> static void transform_output(const float* M, int64_t stride, const float* bias, T* y, int64_t rows, int64_t columns, int64_t W, int64_t O) {
  for (int64_t o = 0; o < COLUMNS; o += LANES) {
    Vector b = bias ? get(bias + o) : Vector{};
    both_ways<6, 4, output_values<T>>([&](int i, int j) { return get(M + (i * 6 + j) * stride + o); }, [&](int i, int j, Vector v) {
      if (i >= rows || j >= columns) return;
      T* out = y + (i * W + j) * O + o;
      put(out, v + b);
      __builtin_prefetch(out + 4 * O, 1);  // of the next tile, to be written
    });
  }
}

// The 4x4 tiles of all pictures, one after the other.
struct Tiling {
  int64_t H, W, down, across, count;
  Tiling(Shape s) : H(s.H), W(s.W), down((s.H + 3) / 4), across((s.W + 3) / 4), count(s.B * down * across) {}
  // f(the picture, the corner's row and column, rows and columns in the picture)
  template <class F> OFTSR void at(int64_t tile, F f) const {
    int64_t row = tile / across, top = row % down * 4, left = tile % across * 4;
    f(row / down, top, left, std::min<int64_t>(4, H - top), std::min<int64_t>(4, W - left));
  }
};

// The positions whose products are wanted: of a doubled picture's rows and columns, whose pixels come in pairs, the point -1 makes 0.
struct Positions {
  int64_t count = 0, at[36];
  Positions(bool without_minus_1) {
    for (int64_t k = 0; k < 36; k++)
      if (!without_minus_1 || (k / 6 != 2 && k % 6 != 2)) at[count++] = k;
  }
};

// From x (B, H, W, C), or, doubled, from (B, H / 2, W / 2, C), each of whose pixels stands for 2x2.
template <class T> static void transform_tile(Shape s, const T* x, int64_t b, int64_t top, int64_t left, T* V, int64_t stride, int64_t panel, int64_t doubled = 0) {
  Window<T> w;
  bool inside = true;
  for (int64_t i = 0; i < 6; i++) {
    int64_t h = top - 1 + i, v = left - 1 + i;
    w.row[i] = h < 0 || h >= s.H ? nullptr : x + (b * (s.H >> doubled) + (h >> doubled)) * (s.W >> doubled) * s.C;
    w.column[i] = v < 0 || v >= s.W ? -1 : (v >> doubled) * s.C;
    inside = inside && w.row[i] && w.column[i] >= 0;
  }
  (inside ? transform_input<true, T> : transform_input<false, T>)(w, s.C, V, stride, panel);
}

// With U [36][O / COLUMNS][C][COLUMNS], whose positions lie u_step apart, in bf16 [36][O / COLUMNS][C / 2][COLUMNS][2]; bias (O,) or
// null; s is y's shape but for its channels.
template <class T> static void winograd(Shape s, int64_t O, const T* x, const T* U, int64_t u_step, const float* bias, T* y, int64_t doubled = 0) {
  int64_t C = s.C;
  int64_t v_step = TILES * C + LINE<T>, m_step = TILES * COLUMNS + LINE<float>;
  Tiling tiles(s);
  Positions wanted(doubled && inner<T> == 1);
  parallel_for(0, (tiles.count + TILES - 1) / TILES, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Vector[]> room(new Vector[36 * (v_step * sizeof(T) + m_step * sizeof(float)) / sizeof(Vector)]());  // begins with a cache line
    float* M = reinterpret_cast<float*>(room.get());      // [36][TILES][COLUMNS]
    T* V = reinterpret_cast<T*>(M + 36 * m_step);         // [36][TILES][C]
    for (int64_t first = begin * TILES; first < std::min(tiles.count, end * TILES); first += TILES) {
      int64_t n = std::min(TILES, tiles.count - first);
      for (int64_t t = 0; t < n; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t, int64_t) {
        transform_tile(s, x, b, top, left, V + t * C, v_step, COLUMNS, doubled);
      });
      for (int64_t o = 0; o < O; o += COLUMNS) {
        for (int64_t i = 0; i < wanted.count; i++) {
          int64_t k = wanted.at[i], next = wanted.at[(i + 1) % wanted.count];
          const T *v = V + k * v_step, *u = U + k * u_step + o * C, *next_v = V + next * v_step, *next_u = U + next * u_step + o * C;
          float* m = M + k * m_step;
          int64_t t = 0;
          for (; t + ROWS <= n; t += ROWS) multiply<ROWS>(v + t * C, u, m + t * COLUMNS, C, t ? next_v + (t - ROWS) / ROWS * COLUMNS * C : next_u);
          for (; t < n; t++) multiply<1>(v + t * C, u, m + t * COLUMNS, C, next_v);
        }
        for (int64_t t = 0; t < n; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t rows, int64_t columns) {
          transform_output(M + t * COLUMNS, m_step, bias ? bias + o : bias, y + ((b * s.H + top) * s.W + left) * O + o, rows, columns, s.W, O);
        });
      }
    }
  });
}

void conv3x3(Shape s, int64_t O, const float* x, const float* weight, const float* bias, float* y, bool doubled) {
  int64_t C = s.C, step = C * O + LINE<float>;
  std::unique_ptr<float[]> U(new float[36 * step]);
  parallel_for(0, O / COLUMNS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) transform_kernels(weight + p * COLUMNS * 9 * C, C, U.get() + p * COLUMNS * C, step);
  });
  winograd(s, O, x, U.get(), step, bias, y, doubled);
}

void conv3x3_input_gradient(Shape s, int64_t C, const float* dy, const float* weight, float* dx) {
  int64_t O = s.C, step = C * O + LINE<float>;
  std::unique_ptr<float[]> U(new float[36 * step]);
  parallel_for(0, C / COLUMNS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) transform_turned(weight + p * COLUMNS, C, O, U.get() + p * COLUMNS * O, step);
  });
  winograd(s, C, dy, U.get(), step, nullptr, dx);
}

// A 1x1 convolution is a matrix product, too: y = x U, with h h + bias + that, of a block of pixels that stays in the cache and COLUMNS
// output channels at a time. x (P, C), U [O / COLUMNS][C][COLUMNS], h and y (P, O).
static void product(int64_t P, int64_t C, int64_t O, const float* x, const float* U, const float* h, const float* bias, float* y) {
  parallel_for(0, (P + PIXELS - 1) / PIXELS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * PIXELS; first < std::min(P, end * PIXELS); first += PIXELS) {
      int64_t last = std::min(P, first + PIXELS);
      for (int64_t o = 0; o < O; o += COLUMNS) {
        auto at = [&](int64_t p) { return h ? h + p * O + o : nullptr; };
        const float* offset = h ? bias + o : nullptr;
        int64_t p = first;
        for (; p + ROWS <= last; p += ROWS) multiply<ROWS>(x + p * C, U + o * C, y + p * O + o, C, x + (p + ROWS) * C, O, at(p), offset);
        for (; p < last; p++) multiply<1>(x + p * C, U + o * C, y + p * O + o, C, x + (p + 1) * C, O, at(p), offset);
      }
    }
  });
}

void add_conv1x1(int64_t P, int64_t C, int64_t O, const float* h, const float* x, const float* weight, const float* bias, float* y) {
  std::unique_ptr<float[]> U(new float[C * O]);
  for (int64_t o = 0; o < O; o++)
    for (int64_t c = 0; c < C; c++) U[(o / COLUMNS * C + c) * COLUMNS + o % COLUMNS] = weight[o * C + c];
  product(P, C, O, x, U.get(), h, bias, y);
}

void conv1x1_input_gradient(int64_t P, int64_t C, int64_t O, const float* dy, const float* weight, float* dx) {
  std::unique_ptr<float[]> U(new float[C * O]);
  for (int64_t o = 0; o < O; o++)
    for (int64_t c = 0; c < C; c++) U[(c / COLUMNS * O + o) * COLUMNS + c % COLUMNS] = weight[o * C + c];
  product(P, O, C, dy, U.get(), nullptr, nullptr, dx);
}

#ifdef __AVX512BF16__
bool multiplies_in_bf16() { return true; }
void conv3x3_bf16(Shape s, int64_t O, const bf16* x, const bf16* U, const float* bias, bf16* y, bool doubled) { winograd(s, O, x, U, s.C * O, bias, y, doubled); }
#else
bool multiplies_in_bf16() { return false; }
void conv3x3_bf16(Shape, int64_t, const bf16*, const bf16*, const float*, bf16*, bool) {}
#endif

// A y A^T of a tile, as much of it as lies in the picture, from its corner on, to N, each of whose positions lies `stride`
// after the one before.
static void transform_gradient(const float* dy, int64_t rows, int64_t columns, int64_t W, int64_t O, float* N, int64_t stride) {
  for (int64_t o = 0; o < O; o += LANES) {
    both_ways<4, 6, output_points>([&](int i, int j) { return i < rows && j < columns ? get(dy + (i * W + j) * O + o) : Vector{}; },
                                   [&](int i, int j, Vector n) { put(N + (i * 6 + j) * stride + o, n); });
  }
}

// U (GRADIENT_ROWS, COLUMNS) += N (n, GRADIENT_ROWS)^T V (n, COLUMNS); rows of N lie O apart, those of U C and those of V `stride`.
static void multiply_transposed(const float* N, const float* V, float* U, int64_t n, int64_t O, int64_t C, int64_t stride = COLUMNS) {
  Vector sum[GRADIENT_ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < GRADIENT_ROWS; r++) sum[r][0] = get(U + r * C), sum[r][1] = get(U + r * C + LANES);
  for (int64_t t = 0; t < n; t++) {
    Vector v0 = get(V + t * stride), v1 = get(V + t * stride + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < GRADIENT_ROWS; r++) {
      Vector a = repeat(N[t * O + r]);
      sum[r][0] = fma(a, v0, sum[r][0]);
      sum[r][1] = fma(a, v1, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < GRADIENT_ROWS; r++) put(U + r * C, sum[r][0]), put(U + r * C + LANES, sum[r][1]);
}

void conv3x3_weight_gradient(Shape s, int64_t O, const float* x, const float* dy, float* dweight, bool doubled) {
  int64_t C = s.C, T = std::max<int64_t>(GRADIENT_TILES, GRADIENT_ROOM / (36 * (C + O)));  // tiles of a block
  int64_t v_step = T * C + LINE<float>, n_step = T * O + LINE<float>, u_step = O * C + LINE<float>;
  Tiling tiles(s);
  Positions wanted(doubled);
  std::unique_ptr<float[]> U(new float[36 * u_step]()), V(new float[36 * v_step]), N(new float[36 * n_step]);  // [36][O][C], [36][C / COLUMNS][T][COLUMNS], [36][T][O]
  for (int64_t first = 0; first < tiles.count; first += T) {
    int64_t n = std::min(T, tiles.count - first);
    parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t rows, int64_t columns) {
        transform_tile(s, x, b, top, left, V.get() + t * COLUMNS, v_step, T * COLUMNS, doubled);
        transform_gradient(dy + ((b * s.H + top) * s.W + left) * O, rows, columns, s.W, O, N.get() + t * O, n_step);
      });
    });
    parallel_for(0, wanted.count, 1, [&](int64_t begin, int64_t end) {  // one core a sum: its order does not depend on how many there are
      for (int64_t i = begin; i < end; i++)
        for (int64_t k = wanted.at[i], c = 0; c < C; c += COLUMNS)
          for (int64_t o = 0; o < O; o += GRADIENT_ROWS) multiply_transposed(N.get() + k * n_step + o, V.get() + k * v_step + c * T, U.get() + k * u_step + o * C + c, n, O, C);
    });
  }
  parallel_for(0, O, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t c = 0; c < C; c += LANES) {
        both_ways<6, 3, kernel_gradient>([&](int i, int j) { return get(U.get() + (i * 6 + j) * u_step + o * C + c); },
                                         [&](int i, int j, Vector g) { put(dweight + (o * 9 + i * 3 + j) * C + c, g); });
      }
  });
}

void conv1x1_weight_gradient(int64_t P, int64_t C, int64_t O, const float* x, const float* dy, float* dweight) {
  std::fill(dweight, dweight + O * C, 0.f);
  parallel_for(0, O / GRADIENT_ROWS, 1, [&](int64_t begin, int64_t end) {  // one core a sum
    for (int64_t first = 0; first < P; first += PIXELS)
      for (int64_t c = 0; c < C; c += COLUMNS)
        for (int64_t o = begin * GRADIENT_ROWS; o < end * GRADIENT_ROWS; o += GRADIENT_ROWS)
          multiply_transposed(dy + first * O + o, x + first * C + c, dweight + o * C + c, std::min(PIXELS, P - first), O, C, C);
  });
}

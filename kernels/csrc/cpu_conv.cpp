// The U-Net's 3x3 convolution on the CPU, in float32, by Winograd's algorithm F(4x4, 3x3) (Lavin and Gray 2016): a tile
// of 4x4 outputs takes 36 multiplications per pair of channels, not 144,
//   Y = A^T [ (G g G^T) * (B^T d B) ] A    of the kernel g (3x3) and the input d (6x6) around the tile,
// and as the bracket is summed over the input's channels, each of its 36 positions is one matrix product over many tiles.
// A block of tiles goes through all three steps in a core's cache. Memory is channels_last: vectors run along channels.
// The gradient of g goes the same way backwards: G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G.
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
constexpr int GRADIENT_ROWS = 4;                                 // which divide the channels
constexpr int64_t GRADIENT_TILES = 256;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

OFTSR Vector get(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
OFTSR void put(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
OFTSR Vector repeat(float a) { return a - Vector{}; }  // a + 0 would be an addition: it makes 0 of -0

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

// The transforms of one column or row, whose values lie `step` apart: G g, B^T d and A^T m, for the points 0, 1, -1, 2, -2
// and infinity; and the transposes of the first and the third, G^T u and A y.
OFTSR void kernel_points(const Vector* g, Vector* out, int step) {
  Vector a = g[0], b = g[step], c = g[2 * step], even = a * (1.f / 24) + c * (1.f / 6), odd = b * (1.f / 12);
  out[0] = a * 0.25f;
  out[step] = (a + b + c) * (-1.f / 6);
  out[2 * step] = (a - b + c) * (-1.f / 6);
  out[3 * step] = even + odd;
  out[4 * step] = even - odd;
  out[5 * step] = c;
}

OFTSR void input_points(const Vector* d, Vector* out, int step) {
  Vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  Vector even = fma(repeat(-4), d2, d4), odd = fma(repeat(-4), d1, d3), even2 = d4 - d2, odd2 = d3 - d1;
  out[0] = fma(repeat(4), d0, fma(repeat(-5), d2, d4));
  out[step] = even + odd;
  out[2 * step] = even - odd;
  out[3 * step] = fma(repeat(2), odd2, even2);
  out[4 * step] = fma(repeat(-2), odd2, even2);
  out[5 * step] = fma(repeat(4), d1, fma(repeat(-5), d3, d5));
}

OFTSR void output_values(const Vector* m, Vector* out, int step) {
  Vector sum = m[step] + m[2 * step], difference = m[step] - m[2 * step], sum2 = m[3 * step] + m[4 * step], difference2 = m[3 * step] - m[4 * step];
  out[0] = m[0] + sum + sum2;
  out[step] = fma(repeat(2), difference2, difference);
  out[2 * step] = fma(repeat(4), sum2, sum);
  out[3 * step] = fma(repeat(8), difference2, difference) + m[5 * step];
}

OFTSR void kernel_gradient(const Vector* u, Vector* out, int step) {
  Vector sum = (u[step] + u[2 * step]) * (-1.f / 6), sum2 = u[3 * step] + u[4 * step];
  out[0] = u[0] * 0.25f + sum + sum2 * (1.f / 24);
  out[step] = (u[2 * step] - u[step]) * (1.f / 6) + (u[3 * step] - u[4 * step]) * (1.f / 12);
  out[2 * step] = sum + sum2 * (1.f / 6) + u[5 * step];
}

OFTSR void output_points(const Vector* y, Vector* out, int step) {
  Vector even = y[0] + y[2 * step], odd = y[step] + y[3 * step], even2 = y[0] + 4 * y[2 * step], odd2 = 2 * y[step] + 8 * y[3 * step];
  out[0] = y[0];
  out[step] = even + odd;
  out[2 * step] = even - odd;
  out[3 * step] = even2 + odd2;
  out[4 * step] = even2 - odd2;
  out[5 * step] = y[3 * step];
}

// One of them along the columns and then along the rows: `in` (N, N) to `out` (M, M).
template <int N, int M, auto TRANSFORM> OFTSR void both_ways(const Vector* in, Vector* out) {
  Vector half[M * N];
#pragma GCC unroll 6
  for (int j = 0; j < N; j++) TRANSFORM(in + j, half + j, N);
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) TRANSFORM(half + i * N, out + i * M, 1);
}

// G g G^T of COLUMNS output channels, weight (O, 3, 3, C) from the first of them on, to U[36][C][COLUMNS], each of whose
// positions lies `stride` after the one before.
static void transform_kernels(const float* weight, int64_t C, float* U, int64_t stride) {
  for (int64_t c = 0; c < C; c += LANES) {
    float turned[36][LANES][COLUMNS];
    for (int o = 0; o < COLUMNS; o++) {
      Vector g[9], u[36];
      for (int k = 0; k < 9; k++) g[k] = get(weight + (o * 9 + k) * C + c);
      both_ways<3, 6, kernel_points>(g, u);
      for (int k = 0; k < 36; k++)
        for (int lane = 0; lane < LANES; lane++) turned[k][lane][o] = u[k][lane];
    }
    for (int k = 0; k < 36; k++) memcpy(U + k * stride + c * COLUMNS, turned[k], sizeof turned[k]);
  }
}

// The picture x (H, W, C), and the corner of a tile's 6x6 inputs.
struct Window { const float* x; int64_t H, W, C, top, left; };

// B^T d B to V, each of whose 36 positions lies `stride` after the one before, and COLUMNS channels `panel` after those
// before. Beyond the picture there are zeros.
template <bool INSIDE> static void transform_input(const Window& w, float* V, int64_t stride, int64_t panel) {
  for (int64_t c = 0; c < w.C; c += LANES) {
    Vector d[36], v[36];
    for (int i = 0; i < 6; i++)
      for (int j = 0; j < 6; j++) {
        int64_t y = w.top + i, x = w.left + j;
        bool there = INSIDE || (y >= 0 && y < w.H && x >= 0 && x < w.W);
        d[i * 6 + j] = there ? get(w.x + (y * w.W + x) * w.C + c) : Vector{};
      }
    both_ways<6, 6, input_points>(d, v);
    for (int k = 0; k < 36; k++) put(V + k * stride + c / COLUMNS * panel + c % COLUMNS, v[k]);
  }
}

// M (R, COLUMNS) = V (R, C) U (C, COLUMNS); rows of M lie O apart.
template <int R> OFTSR void multiply(const float* V, const float* U, float* M, int64_t C, int64_t O) {
  Vector sum[R][2] = {};
  for (int64_t c = 0; c < C; c++) {
    Vector u0 = get(U + c * COLUMNS), u1 = get(U + c * COLUMNS + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      Vector v = repeat(V[r * C + c]);
      sum[r][0] = fma(v, u0, sum[r][0]);
      sum[r][1] = fma(v, u1, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    put(M + r * O, sum[r][0]);
    put(M + r * O + LANES, sum[r][1]);
  }
}

// A^T m A + bias, as much of the 4x4 as lies in the picture, to y (H, W, O) from the tile's corner on.
static void transform_output(const float* M, int64_t stride, const float* bias, float* y, int64_t rows, int64_t columns, int64_t W, int64_t O) {
  for (int64_t o = 0; o < O; o += LANES) {
    Vector m[36], tile[16], b = get(bias + o);
    for (int k = 0; k < 36; k++) m[k] = get(M + k * stride + o);
    both_ways<6, 4, output_values>(m, tile);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) put(y + (i * W + j) * O + o, tile[i * 4 + j] + b);
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

static void transform_tile(Shape s, const float* x, int64_t b, int64_t top, int64_t left, float* V, int64_t stride, int64_t panel) {
  Window w{x + b * s.H * s.W * s.C, s.H, s.W, s.C, top - 1, left - 1};
  bool inside = top > 0 && left > 0 && top + 5 <= s.H && left + 5 <= s.W;
  (inside ? transform_input<true> : transform_input<false>)(w, V, stride, panel);
}

void conv3x3(Shape s, int64_t O, const float* x, const float* weight, const float* bias, float* y) {
  int64_t C = s.C, panel = C * COLUMNS;
  int64_t v_step = TILES * C + LANES, m_step = TILES * O + LANES;  // odd cache lines: powers of two would share a few of the cache's sets
  Tiling tiles(s);
  std::unique_ptr<float[]> U(new float[36 * C * O]);  // [36][O / COLUMNS][C][COLUMNS]
  parallel_for(0, O / COLUMNS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) transform_kernels(weight + p * COLUMNS * 9 * C, C, U.get() + p * panel, C * O);
  });
  parallel_for(0, (tiles.count + TILES - 1) / TILES, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> V(new float[36 * v_step]), M(new float[36 * m_step]);  // [36][TILES][C], [36][TILES][O]
    for (int64_t first = begin * TILES; first < std::min(tiles.count, end * TILES); first += TILES) {
      int64_t n = std::min(TILES, tiles.count - first);
      for (int64_t t = 0; t < n; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t, int64_t) {
        transform_tile(s, x, b, top, left, V.get() + t * C, v_step, COLUMNS);
      });
      for (int64_t k = 0; k < 36; k++)
        for (int64_t p = 0; p < O / COLUMNS; p++) {
          const float *v = V.get() + k * v_step, *u = U.get() + k * C * O + p * panel;
          float* m = M.get() + k * m_step + p * COLUMNS;
          int64_t t = 0;
          for (; t + ROWS <= n; t += ROWS) multiply<ROWS>(v + t * C, u, m + t * O, C, O);
          for (; t < n; t++) multiply<1>(v + t * C, u, m + t * O, C, O);
        }
      for (int64_t t = 0; t < n; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t rows, int64_t columns) {
        transform_output(M.get() + t * O, m_step, bias, y + ((b * s.H + top) * s.W + left) * O, rows, columns, s.W, O);
      });
    }
  });
}

// A y A^T of a tile, as much of it as lies in the picture, from its corner on, to N, each of whose positions lies `stride`
// after the one before.
static void transform_gradient(const float* dy, int64_t rows, int64_t columns, int64_t W, int64_t O, float* N, int64_t stride) {
  for (int64_t o = 0; o < O; o += LANES) {
    Vector y[16], n[36];
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) y[i * 4 + j] = i < rows && j < columns ? get(dy + (i * W + j) * O + o) : Vector{};
    both_ways<4, 6, output_points>(y, n);
    for (int k = 0; k < 36; k++) put(N + k * stride + o, n[k]);
  }
}

// U (GRADIENT_ROWS, COLUMNS) += N (n, GRADIENT_ROWS)^T V (n, COLUMNS); rows of N lie O apart, those of U C.
static void multiply_transposed(const float* N, const float* V, float* U, int64_t n, int64_t O, int64_t C) {
  Vector sum[GRADIENT_ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < GRADIENT_ROWS; r++) sum[r][0] = get(U + r * C), sum[r][1] = get(U + r * C + LANES);
  for (int64_t t = 0; t < n; t++) {
    Vector v0 = get(V + t * COLUMNS), v1 = get(V + t * COLUMNS + LANES);
#pragma GCC unroll 4
    for (int r = 0; r < GRADIENT_ROWS; r++) {
      Vector a = repeat(N[t * O + r]);
      sum[r][0] = fma(a, v0, sum[r][0]);
      sum[r][1] = fma(a, v1, sum[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < GRADIENT_ROWS; r++) put(U + r * C, sum[r][0]), put(U + r * C + LANES, sum[r][1]);
}

void conv3x3_weight_gradient(Shape s, int64_t O, const float* x, const float* dy, float* dweight) {
  int64_t C = s.C, T = GRADIENT_TILES;
  Tiling tiles(s);
  std::unique_ptr<float[]> U(new float[36 * O * C]()), V(new float[36 * T * C]), N(new float[36 * T * O]);  // [36][O][C], [36][C / COLUMNS][T][COLUMNS], [36][T][O]
  for (int64_t first = 0; first < tiles.count; first += T) {
    int64_t n = std::min(T, tiles.count - first);
    parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) tiles.at(first + t, [&](int64_t b, int64_t top, int64_t left, int64_t rows, int64_t columns) {
        transform_tile(s, x, b, top, left, V.get() + t * COLUMNS, T * C, T * COLUMNS);
        transform_gradient(dy + ((b * s.H + top) * s.W + left) * O, rows, columns, s.W, O, N.get() + t * O, T * O);
      });
    });
    parallel_for(0, 36, 1, [&](int64_t begin, int64_t end) {  // one core a sum: its order does not depend on how many there are
      for (int64_t k = begin; k < end; k++)
        for (int64_t c = 0; c < C; c += COLUMNS)
          for (int64_t o = 0; o < O; o += GRADIENT_ROWS) multiply_transposed(N.get() + k * T * O + o, V.get() + k * T * C + c * T, U.get() + (k * O + o) * C + c, n, O, C);
    });
  }
  parallel_for(0, O, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t c = 0; c < C; c += LANES) {
        Vector u[36], g[9];
        for (int k = 0; k < 36; k++) u[k] = get(U.get() + (k * O + o) * C + c);
        both_ways<6, 3, kernel_gradient>(u, g);
        for (int k = 0; k < 9; k++) put(dweight + (o * 9 + k) * C + c, g[k]);
      }
  });
}

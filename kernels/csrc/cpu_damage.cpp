// What happens to pictures in the world, on the CPU: filter, resizing, noise, JPEG; degradations.harm and reference.py say what
// each computes. A thread takes one picture through all of its stages in memory of its own: it stays in the second-level
// cache, and its size changes as it goes. The sums have the reference's order and every product is rounded before it is added
// (-ffp-contract=off): the bits are the reference's. So a pixel of a filtered picture costs k^2 multiplications and as many
// additions, which bounds the whole: the rest is laid out so that these two units are what waits for nothing.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;  // a compiler for narrower registers takes two
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Places __attribute__((vector_size(4 * LANES)));

static Vector load_vec(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static void store_vec(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that is kept from picture to picture.
class Room {
  std::vector<Vector> memory;  // aligned to whole vectors

 public:
  float* floats(int64_t n) {
    if (n > int64_t(memory.size()) * LANES) memory.resize((n + LANES - 1) / LANES);
    return reinterpret_cast<float*>(memory.data());
  }
};

// Three channels of h x w pixels. Rows and columns run on to a multiple of two vectors, so that loops need no ends; what lies there means nothing.
struct Canvas {
  int64_t h = 0, w = 0, pitch = 0;
  float* pixels = nullptr;
  Room room;

  void shape(int64_t height, int64_t width) {
    h = height, w = width, pitch = up(w, 2 * LANES);
    pixels = room.floats(3 * plane());
  }
  int64_t plane() const { return up(h, 2 * LANES) * pitch; }
  float* row(int64_t c, int64_t i) const { return pixels + c * plane() + i * pitch; }
};

// f(j) for n pixels of a row and on to a whole vector: without it small pictures are mostly ends of rows, one pixel at a time.
template <class F> OFTSR void across(int64_t n, F f) {
  for (int64_t j = 0; j < n; j += LANES) {
#pragma omp simd
    for (int64_t i = 0; i < LANES; i++) f(j + i);
  }
}

OFTSR float within(float v, float limit) {
  v = v < 0.0f ? 0.0f : v;
  return v > limit ? limit : v;
}

// ---- the filter

constexpr int ROWS = 4, COLUMNS = LANES == 16 ? 4 : 2;  // of a block, whose sums stay in registers; columns of vectors

static int64_t reflected(int64_t i, int64_t n) {
  int64_t period = std::max<int64_t>(1, 2 * n - 2);
  i = (i % period + period) % period;
  return i < n ? i : 2 * n - 2 - i;
}

// The distance from the middle beyond which the filter is 0, at least 1.
static int64_t radius(const float* f, int64_t k) {
  int64_t r = 1;
  for (int64_t i = 0; i < k * k; i++)
    if (f[i] != 0) r = std::max({r, std::abs(i / k - k / 2), std::abs(i % k - k / 2)});
  return r;
}

// v, in a register: the compiler would read it from memory again for each of its uses, which takes longer than the arithmetic.
OFTSR Vector keep(Vector v) {
#ifdef __AVX__
  asm("" : "+v"(v));
#endif
  return v;
}

// One row of the picture, for the rows FIRST to LAST - 1 of a block: a pixel is read once for all of them. f: the filter's row that meets row 0.
template <int FIRST, int LAST, int N> OFTSR void add_row(Vector (&sum)[ROWS][N], const float* row, const float* f, int64_t k, int64_t side) {
  for (int64_t v = 0; v < side; v++) {
    Vector x[N];
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) x[c] = keep(load_vec(row + v + c * LANES));
#pragma GCC unroll 4
    for (int a = FIRST; a < LAST; a++) {
      float t = f[v - a * k];
#pragma GCC unroll 4
      for (int c = 0; c < N; c++) sum[a][c] += t * x[c];
    }
  }
}

// ROWS rows of N vectors: the rows of the picture go by from top to bottom, so that each sum has the order of the filter's rows.
template <int N> static void filter_block(const float* wide, int64_t pitch, const float* f, int64_t k, int64_t side, float* out, int64_t out_pitch) {
  Vector sum[ROWS][N] = {};
  add_row<0, 1>(sum, wide, f, k, side);
  add_row<0, 2>(sum, wide + pitch, f + k, k, side);
  add_row<0, 3>(sum, wide + 2 * pitch, f + 2 * k, k, side);
  for (int64_t y = 3; y < side; y++) add_row<0, 4>(sum, wide + y * pitch, f + y * k, k, side);
  add_row<1, 4>(sum, wide + side * pitch, f + side * k, k, side);
  add_row<2, 4>(sum, wide + (side + 1) * pitch, f + (side + 1) * k, k, side);
  add_row<3, 4>(sum, wide + (side + 2) * pitch, f + (side + 2) * k, k, side);
#pragma GCC unroll 4
  for (int a = 0; a < ROWS; a++)
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) store_vec(out + a * out_pitch + c * LANES, sum[a][c]);
}

static void filter(Canvas& x, int64_t k, const float* filter, Room& room) {
  int64_t r = radius(filter, k), side = 2 * r + 1, pitch = up(up(x.w, LANES) + 2 * r, LANES);
  const float* f = filter + (k / 2 - r) * (k + 1);
  float* wide = room.floats((up(x.h, ROWS) + 2 * r) * pitch);  // the picture with its reflections
  std::vector<int64_t> left(r), right(r);
  for (int64_t j = 0; j < r; j++) left[j] = reflected(j - r, x.w), right[j] = reflected(x.w + j, x.w);
  for (int64_t c = 0; c < 3; c++) {
    for (int64_t i = 0; i < x.h; i++) {
      const float* from = x.row(c, i);
      float* to = wide + (i + r) * pitch;
      memcpy(to + r, from, x.w * sizeof(float));
      for (int64_t j = 0; j < r; j++) to[j] = from[left[j]], to[r + x.w + j] = from[right[j]];
    }
    for (int64_t i = 0; i < r; i++) {
      memcpy(wide + i * pitch, wide + (r + reflected(i - r, x.h)) * pitch, pitch * sizeof(float));
      memcpy(wide + (r + x.h + i) * pitch, wide + (r + reflected(x.h + i, x.h)) * pitch, pitch * sizeof(float));
    }
    for (int64_t i = 0; i < x.h; i += ROWS) {
      for (int64_t j = 0; j < x.w; j += COLUMNS * LANES) {
        const float* from = wide + i * pitch + j;
        float* to = x.row(c, i) + j;
        switch (std::min<int64_t>(COLUMNS, (x.w - j + LANES - 1) / LANES)) {
          case 1: filter_block<1>(from, pitch, f, k, side, to, x.pitch); break;
          case 2: filter_block<2>(from, pitch, f, k, side, to, x.pitch); break;
          case 3: filter_block<3>(from, pitch, f, k, side, to, x.pitch); break;
          default: filter_block<COLUMNS>(from, pitch, f, k, side, to, x.pitch);
        }
      }
    }
  }
}

// ---- resizing

// Of which pixels of a row of n the m new ones are made: `count` indices and weights each. degradations.taps, line by line.
struct Taps {
  int64_t count = 0;
  std::vector<int32_t> index;
  std::vector<float> weight;

  Taps(Method method, int64_t n, int64_t m, double ratio) {
    double step = std::max(double(n) / double(m), 1.0);
    auto start = [&](int64_t i) { return method == Method::area ? i * n / m : int64_t(floor((double(i) + 0.5) * double(n) / double(m) - 2 * step)); };
    auto end = [&](int64_t i) { return ((i + 1) * n + m - 1) / m; };
    bool same = n == m && (ratio == 0 || ratio == 1);
    if (same) count = 1;
    else if (method == Method::bilinear) count = 2;
    else if (method == Method::bicubic) count = 4;
    else if (method == Method::antialiased) count = int64_t(4 * step) + 2;
    else for (int64_t i = 0; i < m; i++) count = std::max(count, end(i) - start(i));
    index.resize(m * count), weight.resize(m * count);
    float scale = ratio ? float(1 / ratio) : float(double(n) / double(m));
    std::vector<double> w(count);
    for (int64_t i = 0; i < m; i++) {
      int64_t first = i;
      if (same) {
        w[0] = 1;
      } else if (method == Method::area) {
        first = start(i);
        for (int64_t t = 0; t < count; t++) w[t] = double(first + t < end(i)) / double(end(i) - first);
      } else if (method == Method::antialiased) {
        first = start(i);
        double sum = 0;
        for (int64_t t = 0; t < count; t++) {
          bool inside = first + t >= 0 && first + t < n;
          w[t] = inside ? cubic(std::abs(double(first + t) + 0.5 - (double(i) + 0.5) * double(n) / double(m)) / step, -0.5) : 0;
          sum += w[t];
        }
        for (double& v : w) v /= sum;
      } else {
        float at = scale * (float(i) + 0.5f) - 0.5f;
        if (method == Method::bilinear) at = std::max(at, 0.0f);
        float base = floorf(at);
        double t = at - base;
        first = int64_t(base) - (method == Method::bicubic);
        if (method == Method::bilinear) w[0] = 1 - t, w[1] = t;
        else w[0] = cubic(t + 1, -0.75), w[1] = cubic(t, -0.75), w[2] = cubic(1 - t, -0.75), w[3] = cubic(2 - t, -0.75);
      }
      for (int64_t t = 0; t < count; t++) {
        index[i * count + t] = int32_t(std::min(std::max<int64_t>(first + t, 0), n - 1));
        weight[i * count + t] = float(w[t]);
      }
    }
  }

  static double cubic(double d, double a) {
    return d < 1 ? ((a + 2) * d - (a + 3)) * d * d + 1 : d < 2 ? ((a * d - 5 * a) * d + 8 * a) * d - 4 * a : 0;
  }
};

// The lanes of two vectors in turn, a0 b0 a1 b1 ..., from lane FROM of each.
template <int FROM, int... I> OFTSR Vector in_turn(Vector a, Vector b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * int(LANES))...);
#else
  return __builtin_shuffle(a, b, Places{(FROM + I / 2 + I % 2 * int(LANES))...});
#endif
}
OFTSR void interleave(Vector a, Vector b, Vector& first, Vector& second) {
  first = in_turn<0>(a, b, std::make_integer_sequence<int, LANES>());
  second = in_turn<LANES / 2>(a, b, std::make_integer_sequence<int, LANES>());
}

// LANES rows of LANES numbers: interleaving the upper half's rows with the lower's turns the bits of (row, place) round by one.
static void transpose(const float* in, int64_t pitch, float* out, int64_t out_pitch) {
  Vector x[LANES], y[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = load_vec(in + i * pitch);
#pragma GCC unroll 4
  for (int n = 1; n < LANES; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) interleave(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store_vec(out + i * out_pitch, x[i]);
}

// Sums of rows, LANES new ones at a time, which then stand on their side: a column is a vector, and sums of columns are as simple.
static void resize(const Canvas& x, Canvas& y, Method method, double ratio, Room& room) {
  Taps down(method, x.h, y.h, ratio), along(method, x.w, y.w, ratio);
  float *rows = room.floats(LANES * 2 * (x.pitch + y.pitch)), *columns = rows + LANES * x.pitch, *sums = columns + LANES * x.pitch;
  for (int64_t c = 0; c < 3; c++) {
    for (int64_t i = 0; i < y.h; i += LANES) {
      int64_t n = std::min(LANES, y.h - i);
      for (int64_t a = 0; a < n; a++) {
        const float* weight = &down.weight[(i + a) * down.count];
        const int32_t* index = &down.index[(i + a) * down.count];
        for (int64_t j = 0; j < x.w; j += LANES) {
          Vector sum{};
          for (int64_t t = 0; t < down.count; t++) sum += weight[t] * load_vec(x.row(c, index[t]) + j);
          store_vec(rows + a * x.pitch + j, sum);
        }
      }
      for (int64_t j = 0; j < x.w; j += LANES) transpose(rows + j, x.pitch, columns + j * LANES, LANES);
      for (int64_t j = 0; j < y.w; j++) {
        Vector sum{};
        for (int64_t t = j * along.count; t < (j + 1) * along.count; t++) sum += along.weight[t] * load_vec(columns + along.index[t] * LANES);
        store_vec(sums + j * LANES, sum);
      }
      for (int64_t j = 0; j < y.w; j += LANES) transpose(sums + j * LANES, LANES, y.row(c, i) + j, y.pitch);
    }
  }
}

// ---- noise

OFTSR int32_t to_level(float v) { return int32_t(rintf(within(v, 1.0f) * 255.0f)); }

static void add_noise(Canvas& x, float amount, bool gaussian, bool gray, int64_t cells, const int16_t* steps, int64_t seed, uint32_t stream, Room& room) {
  int64_t channels = gray ? 1 : 3, count = channels * x.h * x.pitch;
  float* z = room.floats(count + 3 * x.pitch);  // the normals, laid out like the picture: a pixel's does not depend on the width
  normal(Cpu(), Shape{1, channels, x.h, x.pitch}, PerImage<int64_t>{&seed, 1}, stream, Corner{0, 0}, z);
  if (!gaussian) {
    int32_t *level = reinterpret_cast<int32_t*>(z + count), *bin = level + x.pitch, *step = bin + x.pitch;  // of a row
    auto levels = [&](int64_t c, int64_t i) {
      const float *r = x.row(c, i), *g = x.row(1, i), *b = x.row(2, i);
      if (gray) across(x.w, [&](int64_t j) { level[j] = to_level(r[j] * 0.2989f + g[j] * 0.587f + b[j] * 0.114f); });
      else across(x.w, [&](int64_t j) { level[j] = to_level(r[j]); });
    };
    bool seen[256] = {};
    for (int64_t i = 0; i < channels * x.h; i++) {
      levels(i / x.h, i % x.h);
      for (int64_t j = 0; j < x.w; j++) seen[level[j]] = true;
    }
    int64_t different = std::count(seen, seen + 256, true), log_N = 0;
    while ((int64_t(1) << log_N) < different) log_N++;
    const int16_t* table = steps + log_N * 256 * cells;
    float N = float(int64_t(1) << log_N), per_unit = float(16 * cells / 12.0), last = float(16 * cells - 1);
    for (int64_t i = 0; i < channels * x.h; i++) {
      float* row = z + i * x.pitch;
      levels(i / x.h, i % x.h);
      across(x.w, [&](int64_t j) {
        bin[j] = int32_t(within((row[j] + 6.0f) * per_unit, last));
        step[j] = level[j] * int32_t(cells) + (bin[j] >> 4);
      });
      for (int64_t j = 0; j < x.w; j++) step[j] = table[step[j]];  // a loop of its own: one number at a time is faster than a vector of them
      across(x.w, [&](int64_t j) {
        int32_t k = (step[j] >> 5) + ((bin[j] & 15) >= (step[j] & 31));
        row[j] = float(k) / N - float(level[j]) / 255.0f;
      });
    }
  }
  for (int64_t c = 0; c < 3; c++) {
    for (int64_t i = 0; i < x.h; i++) {
      const float* n = z + ((gray ? 0 : c) * x.h + i) * x.pitch;
      float* row = x.row(c, i);
      across(x.w, [&](int64_t j) { row[j] = within(row[j] + amount * n[j], 1.0f); });
    }
  }
}

// ---- JPEG

static const float LUMA[64] = {16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
                               18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99};
static const float CHROMA[16] = {17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99};

// The cosine transform D[u][x] and its transpose.
struct Cosines {
  float D[8][8], T[8][8];
  Cosines() {
    for (int u = 0; u < 8; u++)
      for (int x = 0; x < 8; x++) D[u][x] = T[x][u] = float((u ? 0.5 : sqrt(0.125)) * cos((2 * x + 1) * double(u) * (3.141592653589793 / 16)));
  }
};
static const Cosines cosines;

// In every eight rows of a tile, LANES x LANES numbers, row a becomes the sum over i of matrix[a][i] times row i.
static void sum_rows(const float (&matrix)[8][8], float* tile, int64_t pitch) {
  for (int64_t begin = 0; begin < LANES; begin += 8) {
    float* rows = tile + begin * pitch;
    Vector row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) row[i] = load_vec(rows + i * pitch);
#pragma GCC unroll 8
    for (int a = 0; a < 8; a++) {
      Vector sum = matrix[a][0] * row[0];
#pragma GCC unroll 8
      for (int i = 1; i < 8; i++) sum += matrix[a][i] * row[i];
      store_vec(rows + a * pitch, sum);
    }
  }
}

// A plane, h rows of w numbers and on to whole tiles, there and back; factors[u][v] of the table for the vertical frequency u and the horizontal v.
static void quantise(float* plane, int64_t pitch, int64_t h, int64_t w, const float (&table)[8][8]) {
  alignas(64) float step[LANES * LANES], tile[LANES * LANES];
  for (int64_t i = 0; i < LANES * LANES; i++) step[i] = table[i % LANES % 8][i / LANES % 8];  // of a tile on its side
  for (int64_t i = 0; i < h; i += LANES) {
    for (int64_t j = 0; j < w; j += LANES) {
      float* place = plane + i * pitch + j;
      sum_rows(cosines.D, place, pitch);
      transpose(place, pitch, tile, LANES);
      sum_rows(cosines.D, tile, LANES);
#pragma omp simd
      for (int64_t k = 0; k < LANES * LANES; k++) tile[k] = rintf(tile[k] / step[k]) * step[k];
      sum_rows(cosines.T, tile, LANES);
      transpose(tile, LANES, place, pitch);
      sum_rows(cosines.T, place, pitch);
    }
  }
}

static void jpeg(Canvas& x, float factor, Room& room) {
  int64_t W = x.pitch, H = up(x.h, 2 * LANES), half = W / 2;
  float *luma = room.floats(H * W + H * half + 4 * W), *cb = luma + H * W, *cr = cb + H / 2 * half, *full = cr + H / 2 * half;
  for (int64_t i = 0; i < H; i++) {
    float *to = luma + i * W, *b = full + i % 2 * W, *r = b + 2 * W;
    int64_t w = i < x.h ? x.w : 0;
    const float *red = x.row(0, i), *green = x.row(1, i), *blue = x.row(2, i);
    across(w, [&](int64_t j) {
      float R = within(red[j], 1.0f) * 255.0f, G = within(green[j], 1.0f) * 255.0f, B = within(blue[j], 1.0f) * 255.0f;
      to[j] = R * 0.299f + G * 0.587f + B * 0.114f - 128.0f;
      b[j] = R * -0.168736f + G * -0.331264f + B * 0.5f;
      r[j] = R * 0.5f + G * -0.418688f + B * -0.081312f;
    });
    std::fill(to + w, to + W, -128.0f), std::fill(b + w, b + W, 0.0f), std::fill(r + w, r + W, 0.0f);  // black, where there is no picture
    if (i % 2 == 0) continue;
    for (int k = 0; k < 2; k++) {  // the colours of two rows at half the resolution
      const float *above = full + 2 * k * W, *below = above + W;
      float* mean = (k ? cr : cb) + i / 2 * half;
      across(half, [&](int64_t j) { mean[j] = ((above[2 * j] + above[2 * j + 1]) + (below[2 * j] + below[2 * j + 1])) * 0.25f; });
    }
  }
  float of_luma[8][8], of_chroma[8][8];
  factor = std::max(factor, 1e-6f);
  for (int u = 0; u < 8; u++) {
    for (int v = 0; v < 8; v++) {
      of_luma[u][v] = LUMA[8 * v + u] * factor;  // transposed, as published
      of_chroma[u][v] = (u < 4 && v < 4 ? CHROMA[4 * u + v] : 99.0f) * factor;
    }
  }
  quantise(luma, W, x.h, x.w, of_luma);
  quantise(cb, half, (x.h + 1) / 2, (x.w + 1) / 2, of_chroma);
  quantise(cr, half, (x.h + 1) / 2, (x.w + 1) / 2, of_chroma);
  for (int64_t i = 0; i < x.h; i++) {
    float *red = x.row(0, i), *green = x.row(1, i), *blue = x.row(2, i), *b = full, *r = full + W;
    if (i % 2 == 0) {
      for (int64_t j = 0; j < half; j += LANES) {
        Vector first, second, in_b = load_vec(cb + i / 2 * half + j), in_r = load_vec(cr + i / 2 * half + j);
        interleave(in_b, in_b, first, second);
        store_vec(b + 2 * j, first), store_vec(b + 2 * j + LANES, second);
        interleave(in_r, in_r, first, second);
        store_vec(r + 2 * j, first), store_vec(r + 2 * j + LANES, second);
      }
    }
    const float* y = luma + i * W;
    auto unit = [](float v) { return within(v, 255.0f) / 255.0f; };
    across(x.w, [&](int64_t j) {
      float Y = y[j] + 128.0f;
      red[j] = unit(Y + r[j] * 1.402f);
      green[j] = unit(Y + b[j] * -0.344136f + r[j] * -0.714136f);
      blue[j] = unit(Y + b[j] * 1.772f);
    });
  }
}

// ---- all of it

static int64_t part(int64_t n, double ratio) { return std::max<int64_t>(1, int64_t(double(n) * ratio)); }

void damage(Shape s, const int64_t* first, const Stage* stages, const float* filters, int64_t cells, const int16_t* steps, PerImage<int64_t> seeds,
            int64_t h, int64_t w, const float* x_1, float* out) {
  torch::stable::parallel_for(0, s.B, 1, [&](int64_t begin, int64_t end) {
    Canvas x, other;
    Room room;
    for (int64_t b = begin; b < end; b++) {
      x.shape(s.H, s.W);
      for (int64_t i = 0; i < 3 * s.H; i++) {
        const float* from = x_1 + (b * 3 * s.H + i) * s.W;
        float* row = x.row(i / s.H, i % s.H);
#pragma omp simd
        for (int64_t j = 0; j < s.W; j++) row[j] = from[j] * 0.5f + 0.5f;
      }
      for (const Stage* d = stages + first[b]; d < stages + first[b + 1]; d++) {
        switch (int(d->kind)) {
          case Stage::BLUR: filter(x, int64_t(d->a), filters + int64_t(d->b), room); break;
          case Stage::RESIZE:
            other.shape(d->d ? part(x.h, d->d) : int64_t(d->b), d->d ? part(x.w, d->d) : int64_t(d->c));
            resize(x, other, Method(int(d->a)), d->d, room);
            std::swap(x, other);
            break;
          case Stage::NOISE: add_noise(x, float(d->a), d->b, d->c, cells, steps, seeds[b], uint32_t(d->d), room); break;
          default: jpeg(x, float(d->a), room);
        }
      }
      if (x.h != h || x.w != w) throw std::runtime_error("a picture's stages must end at the size asked for.");
      for (int64_t i = 0; i < 3 * h; i++) memcpy(out + (b * 3 * h + i) * w, x.row(i / h, i % h), w * sizeof(float));
    }
  });
}

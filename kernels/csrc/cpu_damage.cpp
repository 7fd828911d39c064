// What happens to pictures in the world, on the CPU: filter, resizing, noise, JPEG; reference.py says what each computes.
// A task is one picture, or one channel of it, at its own size, so that nothing is computed that nobody sees. The sums have
// the reference's order and every product is rounded before it is added (-ffp-contract=off): the bits are the reference's.
// Vectors of the compiler's own type hold the running sums in registers while the taps go by.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

typedef float Vec __attribute__((vector_size(64)));   // 16 pixels
typedef float Half __attribute__((vector_size(32)));  // a row of a block of JPEG

template <class V> static V load_vec(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V> static void store_vec(float* p, V v) { memcpy(p, &v, sizeof v); }

template <class F> static void for_each(int64_t n, F f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

// ---- the filter

constexpr int64_t BLOCK = 64;  // pixels of a row whose sums are taken side by side

static int64_t reflected(int64_t i, int64_t n) {
  int64_t period = std::max<int64_t>(1, 2 * n - 2);
  i = (i % period + period) % period;
  return i < n ? i : 2 * n - 2 - i;
}

// The distance from the middle beyond which the filter is 0.
static int64_t radius(const float* f, int64_t k) {
  int64_t r = 0;
  for (int64_t i = 0; i < k * k; i++)
    if (f[i] != 0) r = std::max({r, std::abs(i / k - k / 2), std::abs(i % k - k / 2)});
  return r;
}

void filter2d(Shape s, const int64_t* sizes, int64_t k, const float* filters, const float* x, float* y) {
  for_each(s.B * s.C, [&](int64_t plane) {
    int64_t b = plane / s.C, h = sizes[2 * b], w = sizes[2 * b + 1], r = radius(filters + b * k * k, k), d = k / 2 - r;
    const float *f = filters + b * k * k + d * k + d, *in = x + plane * s.H * s.W;
    float* out = y + plane * s.H * s.W;
    int64_t blocks = (w + BLOCK - 1) / BLOCK, pitch = blocks * BLOCK + 2 * r;
    std::vector<float> wide((h + 2 * r) * pitch);  // the picture with its reflections
    std::vector<int64_t> from(w + 2 * r);
    for (int64_t j = 0; j < w + 2 * r; j++) from[j] = reflected(j - r, w);
    for (int64_t i = 0; i < h + 2 * r; i++) {
      const float* row = in + reflected(i - r, h) * s.W;
      for (int64_t j = 0; j < w + 2 * r; j++) wide[i * pitch + j] = row[from[j]];
    }
    for (int64_t i = 0; i < h; i++) {
      for (int64_t j = 0; j < w; j += BLOCK) {
        Vec a0{}, a1{}, a2{}, a3{};
        for (int64_t u = 0; u <= 2 * r; u++) {
          const float* row = &wide[(i + u) * pitch + j];
          for (int64_t v = 0; v <= 2 * r; v++, row++) {
            float t = f[u * k + v];
            a0 += t * load_vec<Vec>(row), a1 += t * load_vec<Vec>(row + 16), a2 += t * load_vec<Vec>(row + 32), a3 += t * load_vec<Vec>(row + 48);
          }
        }
        float sums[BLOCK];
        store_vec(sums, a0), store_vec(sums + 16, a1), store_vec(sums + 32, a2), store_vec(sums + 48, a3);
        memcpy(out + i * s.W + j, sums, std::min(BLOCK, w - j) * sizeof(float));
      }
      std::fill(out + i * s.W + w, out + (i + 1) * s.W, 0.0f);
    }
    std::fill(out + h * s.W, out + s.H * s.W, 0.0f);
  });
}

// ---- resizing

// One picture's taps, those of a place side by side with its neighbours': weight[t][i], index[t][i], for the i < length that have any.
struct Places {
  int64_t length = 0, extent = 0;  // extent: one more than the largest index
  std::vector<int32_t> index;
  std::vector<float> weight;
  Places(Taps taps, int64_t b) : index(taps.length * taps.taps), weight(taps.length * taps.taps) {
    for (int64_t i = 0; i < taps.length; i++) {
      for (int64_t t = 0; t < taps.taps; t++) {
        int64_t from = (b * taps.length + i) * taps.taps + t, to = t * taps.length + i;
        index[to] = int32_t(taps.index[from]);
        weight[to] = taps.weight[from];
        if (weight[to] != 0) length = i + 1, extent = std::max<int64_t>(extent, index[to] + 1);
      }
    }
  }
};

void resample(Shape s, Taps rows, Taps cols, const float* x, float* y) {
  for_each(s.B, [&](int64_t b) {
    Places down(rows, b), along(cols, b);
    std::vector<float> line(s.W);
    for (int64_t plane = b * s.C; plane < (b + 1) * s.C; plane++) {
      const float* in = x + plane * s.H * s.W;
      float* out = y + plane * rows.length * cols.length;
      std::fill(out, out + rows.length * cols.length, 0.0f);
      for (int64_t i = 0; i < down.length; i++, out += cols.length) {
        std::fill(line.begin(), line.end(), 0.0f);
        for (int64_t t = 0; t < rows.taps; t++) {
          float weight = down.weight[t * rows.length + i];
          const float* row = in + down.index[t * rows.length + i] * s.W;
          if (weight == 0) continue;
#pragma omp simd
          for (int64_t j = 0; j < along.extent; j++) line[j] += weight * row[j];
        }
        for (int64_t t = 0; t < cols.taps; t++) {
          const float* weight = &along.weight[t * cols.length];
          const int32_t* index = &along.index[t * cols.length];
          const float* from = line.data();
#pragma omp simd
          for (int64_t j = 0; j < along.length; j++) out[j] += weight[j] * from[index[j]];
        }
      }
    }
  });
}

// ---- noise

static float to_byte(float v) { return rintf(std::min(std::max(v, 0.0f), 1.0f) * 255.0f); }

void photon_noise(Shape s, const int64_t* sizes, const float* amount, const bool* gaussian, const bool* gray, int64_t bins, const int16_t* quantiles,
                  PerImage<int64_t> seeds, uint32_t stream, const float* x, float* y) {
  for_each(s.B, [&](int64_t b) {
    int64_t h = sizes[2 * b], w = sizes[2 * b + 1], plane = s.H * s.W;
    const float* in = x + b * 3 * plane;
    float* out = y + b * 3 * plane;
    memcpy(out, in, 3 * plane * sizeof(float));
    if (amount[b] == 0) return;
    int64_t seed = seeds[b], channels = gray[b] ? 1 : 3;
    std::vector<float> z(3 * h * w), v(3 * h * w);  // the normals and the 8-bit values, of 1 or 3 channels
    normal(Cpu(), Shape{1, channels, h, w}, PerImage<int64_t>{&seed, 1}, stream, Corner{0, 0}, z.data());
    if (!gaussian[b]) {
      bool seen[256] = {};
      for (int64_t c = 0; c < channels; c++) {
        for (int64_t i = 0; i < h; i++) {
          const float *r = in + c * plane + i * s.W, *g = r + plane, *l = g + plane;
          float* byte = &v[(c * h + i) * w];
          if (gray[b])
            for (int64_t j = 0; j < w; j++) byte[j] = to_byte(r[j] * 0.2989f + g[j] * 0.587f + l[j] * 0.114f);
          else
            for (int64_t j = 0; j < w; j++) byte[j] = to_byte(r[j]);
          for (int64_t j = 0; j < w; j++) seen[int(byte[j])] = true;
        }
      }
      int64_t different = std::count(seen, seen + 256, true), log_N = 0;
      while ((int64_t(1) << log_N) < different) log_N++;
      const int16_t* table = quantiles + log_N * 256 * bins;
      float N = float(int64_t(1) << log_N), per_unit = float(bins / 12.0);
      for (int64_t i = 0; i < channels * h * w; i++) {
        int64_t place = std::min<int64_t>(std::max<int64_t>(int64_t((z[i] + 6.0f) * per_unit), 0), bins - 1);
        z[i] = float(table[int64_t(v[i]) * bins + place]) / N - v[i] / 255.0f;
      }
    }
    for (int64_t c = 0; c < 3; c++) {
      for (int64_t i = 0; i < h; i++) {
        const float *n = &z[((gray[b] ? 0 : c) * h + i) * w], *from = in + c * plane + i * s.W;
        float* to = out + c * plane + i * s.W;
#pragma omp simd
        for (int64_t j = 0; j < w; j++) to[j] = std::min(std::max(from[j] + amount[b] * n[j], 0.0f), 1.0f);
      }
    }
  });
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

// Row a of the result is the sum over i of matrix[a][i] times row i: eight rows of W pixels, W a multiple of 8.
static void sum_rows(const float (&matrix)[8][8], int64_t W, const float* in, float* out) {
  for (int64_t j = 0; j < W; j += 8) {
    Half row[8];
    for (int i = 0; i < 8; i++) row[i] = load_vec<Half>(in + i * W + j);
    for (int a = 0; a < 8; a++) {
      Half sum = matrix[a][0] * row[0];
      for (int i = 1; i < 8; i++) sum += matrix[a][i] * row[i];
      store_vec(out + a * W + j, sum);
    }
  }
}

// The same along a row of 8: place a is the sum over i of matrix[a][i] x[i]; `transposed` is matrix's transpose.
static Half sum_row(const float (&transposed)[8][8], const float* x) {
  Half sum = load_vec<Half>(transposed[0]) * x[0];
  for (int i = 1; i < 8; i++) sum += load_vec<Half>(transposed[i]) * x[i];
  return sum;
}

static void quantise(int64_t H, int64_t W, const float (&table)[64], float* plane) {
  std::vector<float> work(8 * W);
  for (int64_t i = 0; i < H; i += 8) {
    sum_rows(cosines.D, W, plane + i * W, work.data());
    for (int64_t j = 0; j < 8 * W; j += 8) {
      alignas(32) float c[8];
      store_vec(c, sum_row(cosines.T, &work[j]));
      const float* q = table + j / W * 8;
      for (int v = 0; v < 8; v++) c[v] = rintf(c[v] / q[v]) * q[v];
      store_vec(&work[j], sum_row(cosines.D, c));
    }
    sum_rows(cosines.T, W, work.data(), plane + i * W);
  }
}

void jpeg(Shape s, const int64_t* sizes, const float* factors, const float* x, float* y) {
  for_each(s.B, [&](int64_t b) {
    int64_t h = sizes[2 * b], w = sizes[2 * b + 1], plane = s.H * s.W, H = (h + 15) / 16 * 16, W = (w + 15) / 16 * 16;
    const float* in = x + b * 3 * plane;
    float* out = y + b * 3 * plane;
    memcpy(out, in, 3 * plane * sizeof(float));
    if (factors[b] == 0) return;
    std::vector<float> luma(H * W, -128.0f), full(2 * H * W), half(H * W / 2);  // black, where there is no picture
    for (int64_t i = 0; i < h; i++) {
      const float *r = in + i * s.W, *g = r + plane, *l = g + plane;
      float *to = &luma[i * W], *cb = &full[i * W], *cr = cb + H * W;
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        float R = std::min(std::max(r[j], 0.0f), 1.0f) * 255.0f, G = std::min(std::max(g[j], 0.0f), 1.0f) * 255.0f, B = std::min(std::max(l[j], 0.0f), 1.0f) * 255.0f;
        to[j] = R * 0.299f + G * 0.587f + B * 0.114f - 128.0f;
        cb[j] = R * -0.168736f + G * -0.331264f + B * 0.5f;
        cr[j] = R * 0.5f + G * -0.418688f + B * -0.081312f;
      }
    }
    for (int64_t i = 0; i < H; i++) {  // H / 2 rows of each of two colours
      const float *a = &full[2 * i * W], *c = a + W;
#pragma omp simd
      for (int64_t j = 0; j < W / 2; j++) half[i * W / 2 + j] = ((a[2 * j] + a[2 * j + 1]) + (c[2 * j] + c[2 * j + 1])) * 0.25f;
    }
    float of_luma[64], of_chroma[64], factor = std::max(factors[b], 1e-6f);
    for (int u = 0; u < 8; u++) {
      for (int v = 0; v < 8; v++) {
        of_luma[8 * u + v] = LUMA[8 * v + u] * factor;  // transposed, as published
        of_chroma[8 * u + v] = (u < 4 && v < 4 ? CHROMA[4 * u + v] : 99.0f) * factor;
      }
    }
    quantise(H, W, of_luma, luma.data());
    quantise(H, W / 2, of_chroma, half.data());
    for (int64_t i = 0; i < h; i++) {
      float *r = out + i * s.W, *g = r + plane, *l = g + plane;
      const float *from = &luma[i * W], *cb = &half[i / 2 * (W / 2)], *cr = cb + H * W / 4;
      auto unit = [](float v) { return std::min(std::max(v, 0.0f), 255.0f) / 255.0f; };
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        float Y = from[j] + 128.0f, B = cb[j / 2], R = cr[j / 2];
        r[j] = unit(Y + R * 1.402f);
        g[j] = unit(Y + B * -0.344136f + R * -0.714136f);
        l[j] = unit(Y + B * 1.772f);
      }
    }
  });
}

// The formulas, one inline function each, for the CPU and the GPU alike: what runs on a card is what the
// tests of any machine have checked. reference.py is the definition; here stand the same operations in the
// same order, and neither compiler may fuse a multiplication with an addition (-ffp-contract=off,
// --fmad=false): fusing rounds once instead of twice, and a picture's noise would depend on the machine.
//
// Equation numbers are the paper's. Symbols: x_1 HR, x_lr = H^T(H(x_1) + n), x_0 the noised start, x_t, v, dt, t, s.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define OFTSR __host__ __device__ __forceinline__
#else
#define OFTSR inline __attribute__((always_inline))
#endif

// ---- storage: what lies in memory. Arithmetic is float, whatever lies there (double for double).

struct bf16 { uint16_t bits; };  // the upper half of a float
struct f16 { uint16_t bits; };   // IEEE half

template <class T> struct Arith { using type = float; };
template <> struct Arith<double> { using type = double; };
template <class T> using arith = typename Arith<T>::type;

template <class To, class From> OFTSR To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

OFTSR float load(float x) { return x; }
OFTSR double load(double x) { return x; }
OFTSR float load(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
OFTSR float load(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // A normal number is shifted into a float's fields and its exponent's bias mended by one multiplication;
  // a subnormal one becomes the low bits of 0.5, and 0.5 is taken off. No branch, so that the loop vectorises.
  uint32_t twice = uint32_t(x.bits) << 17, sign = uint32_t(x.bits & 0x8000) << 16;
  float normal = bits_as<float>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  float subnormal = bits_as<float>((twice >> 17) | (126u << 23)) - 0.5f;
  return bits_as<float>(sign | bits_as<uint32_t>(twice < (1u << 27) ? subnormal : normal));
#endif
}

template <class T> OFTSR T store(arith<T> x) { return x; }
template <> OFTSR bf16 store<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u = bits_as<uint32_t>(x);
  uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? 0x7FC0 : rounded)};
}
template <> OFTSR f16 store<f16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  // Adding a power of two, chosen by x's exponent, makes the float adder itself round at the half's last bit.
  uint32_t u = bits_as<uint32_t>(x), twice = u + u, bias = twice & 0xFF000000;
  bias = bias < 0x71000000 ? 0x71000000 : bias;
  float clipped = bits_as<float>(u & 0x7FFFFFFF) * 0x1p+112f * 0x1p-110f;  // too large becomes infinite
  uint32_t sum = bits_as<uint32_t>(bits_as<float>((bias >> 1) + 0x07800000) + clipped);
  uint32_t magnitude = ((sum >> 13) & 0x7C00) + (sum & 0xFFF);
  return {uint16_t(((u >> 16) & 0x8000) | (twice > 0xFF000000 ? 0x7E00 : magnitude))};
#endif
}

// ---- noise: Philox 4x32-10 (Salmon et al., SC 2011), then Box-Muller. A pure function of key and counter,
// so any thread can draw any pixel's noise, in any order, and nothing is stored.

struct Words { uint32_t r0, r1, r2, r3; };

OFTSR Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10  // only a loop without loops inside is vectorised
#endif
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Natural logarithm on (0, 1], normal numbers only: the exponent by its bits, the mantissa by a polynomial (Cephes).
OFTSR float log_unit(float u) {
  uint32_t bits = bits_as<uint32_t>(u);
  float m = bits_as<float>((bits & 0x007FFFFF) | 0x3F000000);  // u = m 2^e, m in [1/2, 1)
  int e = int(bits >> 23) - 126;
  bool small = m < 0.70710678118654752f;
  float x = (small ? m + m : m) - 1.0f, k = float(small ? e - 1 : e), z = x * x;
  float y = 7.0376836292e-2f;
  y = y * x + -1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x + -1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x + -1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x + -2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * z + k * -2.12194440e-4f - z * 0.5f;
  return x + y + k * 0.693359375f;
}

// Two words to two normals: radius sqrt(-2 ln u), angle 2 pi b / 2^32, whose quarter turns come off in integers.
OFTSR void box_muller(uint32_t a, uint32_t b, float& n0, float& n1) {
  float radius = sqrtf(log_unit(float(a) * 0x1p-32f + 0x1p-33f) * -2.0f);
  uint32_t quarter = (b + (1u << 29)) >> 30;
  float angle = float(int32_t(b - (quarter << 30))) * float(6.283185307179586 / 4294967296.0);
  float z = angle * angle;
  float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z + -1.6666654611e-1f) * z * angle + angle;
  float cosine = ((2.443315711809948e-5f * z + -1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - z * 0.5f + 1.0f;
  bool odd = quarter & 1;
  float c = odd ? sine : cosine, s = odd ? cosine : sine;
  n0 = radius * ((quarter + 1) & 2 ? -c : c);
  n1 = radius * (quarter & 2 ? -s : s);
}

// The four normals of channels 4 block .. 4 block + 3 at pixel (h, w) of the picture with this seed.
OFTSR void draw(int64_t seed, uint32_t stream, uint32_t block, uint32_t h, uint32_t w, float& n0, float& n1, float& n2, float& n3) {
  Words r = philox(w, h, block, stream, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
  box_muller(r.r0, r.r1, n0, n1);
  box_muller(r.r2, r.r3, n2, n3);
}

// ---- the flow

// Eq. (4): x_0 = sqrt(1 - sigma_p^2) x_lr + sigma_p eps; `signal` is the root.
template <class A> OFTSR A perturb(A x_lr, float eps, A signal, A sigma_p) { return x_lr * signal + A(eps) * sigma_p; }

// The straight path of Eq. (5): x_t = (1 - t) x_0 + t x_1.
template <class A> OFTSR A on_path(A x_0, A x_1, A t) { return x_0 * (A(1) - t) + x_1 * t; }

// One Euler step, x_t + dt v; with x_0 and t for x_t and dt it is Eq. (7).
template <class A> OFTSR A euler(A x_t, A v, A dt) { return x_t + v * dt; }

// The last stage of RK2, from where the first stage left the state: x + dt (b1 v1 + b2 v2).
template <class A> OFTSR A rk2(A x, A v1, A v2, A b1, A b2, A dt) { return x + (v1 * b1 + v2 * b2) * dt; }

// What the Dormand-Prince pair's two orders disagree by, in units of what is allowed; `slope` is sum_j e_j k_j.
template <class A> OFTSR A dopri5_ratio(A slope, A dt, A x_t, A x_new, A atol, A rtol) {
  A a = x_t < A(0) ? -x_t : x_t, b = x_new < A(0) ? -x_new : x_new;
  return slope * dt / ((a > b ? a : b) * rtol + atol);
}

// ---- distillation

// Eq. (9)'s target v_phi(t) + (s-t)/s (v_theta - v_phi(t)); `w` is (s-t)/s.
template <class A> OFTSR A target(A v_phi, A v_theta, A w) { return v_phi + (v_theta - v_phi) * w; }

// The residuals whose mean squares are Eqs. (9), (10), (11): to the target, to the teacher at t, to the teacher at 0.
template <class A> struct Residuals { A distill, align, start; };
template <class A> OFTSR Residuals<A> residuals(A v_t, A v_s, A v_0, A v_step, A u_t, A u_0, A t, A w) {
  return {v_s - target(v_t, v_step, w), (v_t - u_t) * (A(1) - t), v_0 - u_0};
}

// ---- the norm-activation

// a b + c, in one instruction where there is one. Only here, where no reference has to agree to the last bit.
OFTSR float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^-|x| to 2 units in the last place: -|x| = n ln 2 + r, a polynomial for e^r (Cephes), n into the exponent's bits.
// Beyond 87, short of the subnormal numbers, it is 0. The comparisons are of integers: compilers do them without a branch.
OFTSR float exp_minus_abs(float x) {
  uint32_t bits = bits_as<uint32_t>(x) & 0x7FFFFFFF, limit = 0x42AE0000;  // 87.0
  float m = -bits_as<float>(bits < limit ? bits : limit);
  float shift = 12582912.0f + 127.0f;  // adding 1.5 2^23 rounds to an integer, and 127 makes it an exponent's bits
  float shifted = multiply_add(m, 1.44269504088896341f, shift), n = shifted - shift;
  float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, m));
  float y = 1.9875691500e-4f;
  y = multiply_add(y, r, 1.3981999507e-3f);
  y = multiply_add(y, r, 8.3334519073e-3f);
  y = multiply_add(y, r, 4.1665795894e-2f);
  y = multiply_add(y, r, 1.6666665459e-1f);
  y = multiply_add(y, r, 5.0000001201e-1f);
  y = multiply_add(y * r, r, r) + 1.0f;
  return y * bits_as<float>(bits < limit ? bits_as<uint32_t>(shifted) << 23 : 0);
}
OFTSR double exp_minus_abs(double x) { return exp(x < 0 ? x : -x); }

// 1 / (1 + e^-u), from the exponential that cannot overflow.
template <class A> OFTSR A sigmoid(A u) {
  A e = exp_minus_abs(u);
  return (u < A(0) ? e : A(1)) / (A(1) + e);
}
template <class A> OFTSR A silu(A u) {
  A e = exp_minus_abs(u);
  return (u < A(0) ? u * e : u) / (A(1) + e);
}
template <class A> OFTSR A silu_slope(A u) {
  A s = sigmoid(u);
  return s * (A(1) + u * (A(1) - s));
}

// ---- pictures

// [-1, 1] to a byte: clamped, scaled, rounded half to even (rint); NaN becomes 0, as a comparison with it is false.
template <class A> OFTSR uint8_t to_byte(A x) {
  x = x > A(-1) ? x : A(-1);
  x = x < A(1) ? x : A(1);
  return uint8_t(int(rint(x * A(127.5) + A(127.5))));
}

// What the three parts of the extension share: ops.cpp (checks, dispatch) hands views of tensors to
// cpu.cpp or cuda.cu (loops, launches). No torch header here, so that nvcc compiles in seconds.
#pragma once
#include <stdint.h>

#include "flow.h"

enum class DType { f32, f64, bf16, f16 };

struct Shape { int64_t B, C, H, W; };

// Where in a whole picture the first pixel lies, whose noise is the picture's.
struct Corner { int64_t h, w; };

// A (B, C, H, W) tensor, whatever its memory format, or a slice of one: strides in elements.
struct View {
  void* data;
  DType dtype;
  int64_t b, c, h, w;
  template <class T> OFTSR T* at(int64_t ib, int64_t ic, int64_t ih) const { return static_cast<T*>(data) + ib * b + ic * c + ih * h; }
};

// A (B,) tensor; a stride of 0 repeats one value.
template <class T> struct PerImage {
  const T* data;
  int64_t stride;
  OFTSR T operator[](int64_t b) const { return data[b * stride]; }
};

// dt: one number, or one a picture.
struct Step {
  PerImage<float> per_image;
  double number;
  template <class A> OFTSR A at(int64_t b) const { return per_image.data ? A(per_image[b]) : A(number); }
};

// A weighted sum of up to seven velocities.
struct Sum {
  int n;
  View k[7];
  double coefficient[7];
};

// GroupNorm's tensors, pixels in one dimension: C channels in G groups over P pixels. The statistics are per
// (b, group); weight and bias (C,); scale and shift (B, C) with a stride of their rows, or null. All these are float32,
// or float64 where x is.
struct Norm {
  int64_t B, C, P, G;
  View x;
  const void *weight, *bias, *scale, *shift;
  int64_t scale_stride, shift_stride;
  void *mean, *rstd;
};

constexpr int64_t PARTIAL_SUMS = 1024;  // what a GPU's blocks leave of a sum, to be added up by one block more

struct Cpu {};
struct Cuda { void* stream; };

// Each is specialised twice: <Cpu> in cpu.cpp and cpu_norm.cpp, <Cuda> in cuda.cu and cuda_norm.cu.
template <class D> void normal(D, Shape, PerImage<int64_t> seeds, uint32_t stream, Corner, float* out);
template <class D> void noise_augment(D, Shape, View x_lr, double sigma_p, PerImage<int64_t> seeds, Corner, View x_in);
template <class D> void flow_training_pair(D, Shape, View x_1, View x_lr, PerImage<float> t, double sigma_p, PerImage<int64_t> seeds, View x_in, View velocity);
template <class D> void euler_step(D, Shape, View x, View v, Step dt);
template <class D> void rk2_stage(D, Shape, View x, View v1, View v2, Step dt, double b1, double b2);
template <class D> void student_state(D, Shape, View x_in, View v, PerImage<float> t, View out);
template <class D> void dopri5_stage(D, Shape, View x, View x_t, const Sum&, double dt);
template <class D> void dopri5_error(D, Shape, View x, View x_t, const Sum&, double dt, double atol, double rtol, double* partial, double* out);
template <class D> void distill_target(D, Shape, View v_phi, View v_theta, PerImage<float> t, PerImage<float> s, View out);
template <class D> void distill_loss(D, Shape, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> s, double* partial, void* out);
template <class D> void distill_loss_backward(D, Shape, const void* grad, View v_phi, View v_step, View v_theta, PerImage<float> t, PerImage<float> s, View out);
template <class D> void to_uint8(D, Shape, View x, uint8_t* out);
template <class D> void group_norm_silu(D, const Norm&, double eps, double* workspace, View y);
template <class D> void group_norm_silu_backward(D, const Norm&, View dy, double* workspace, View dx, void* dweight, void* dbias, void* dscale, void* dshift);

// A 3x3 convolution of x (B, H, W, C) with zeros around it, weight (O, 3, 3, C), bias (O,), to y (B, H, W, O), float32 in
// the CPU's memory; C and O multiples of 32. Doubled: x is (B, H / 2, W / 2, C), each of its pixels standing for 2x2. In cpu_conv.cpp.
void conv3x3(Shape, int64_t O, const float* x, const float* weight, const float* bias, float* y, bool doubled);
// Its gradients. Of x, where dy (B, H, W, O) is Shape's: to dx (B, H, W, C), of a doubled picture as of one that is stored so.
void conv3x3_input_gradient(Shape, int64_t C, const float* dy, const float* weight, float* dx);
void conv3x3_weight_gradient(Shape, int64_t O, const float* x, const float* dy, float* dweight, bool doubled);
// y (P, O) = h (P, O), which may be y, + x (P, C) weight (O, C)^T + bias (O,), float32 in the CPU's memory; C and O multiples of 32. And its gradients.
void add_conv1x1(int64_t P, int64_t C, int64_t O, const float* h, const float* x, const float* weight, const float* bias, float* y);
void conv1x1_input_gradient(int64_t P, int64_t C, int64_t O, const float* dy, const float* weight, float* dx);
void conv1x1_weight_gradient(int64_t P, int64_t C, int64_t O, const float* x, const float* dy, float* dweight);
// conv3x3 in bf16, of a weight that is transformed already, U [36][O / 32][C / 2][32][2]. Only in a library compiled for processors that multiply in bf16 (AVX-512's, not AMX).
bool multiplies_in_bf16();
void conv3x3_bf16(Shape, int64_t O, const bf16* x, const bf16* U, const float* bias, bf16* y, bool doubled);

// What happens to pictures in the world (degradations.py), stage by stage, float32 in the CPU's memory. In cpu_damage.cpp.
enum class Method { area, bilinear, bicubic, antialiased };
struct Stage {
  enum { BLUR, RESIZE, NOISE, JPEG };
  double kind;
  double a, b, c, d;  // BLUR: side, first of `filters`; RESIZE: method, then height and width, or (not 0) a ratio; NOISE: amount, gaussian, gray, stream; JPEG: factor
};
// Picture b, x_1 (B, 3, H, W) in [-1, 1], goes through the stages first[b] to first[b + 1] - 1, to out (B, 3, h, w).
void damage(Shape, const int64_t* first, const Stage* stages, const float* filters, int64_t cells, const int16_t* steps, PerImage<int64_t> seeds,
            int64_t h, int64_t w, const float* x_1, float* out);

// f(T()) with the storage type that a view has.
template <class F> void by_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
}

// f(X(), V()) for a state and its velocity, which has the state's type, or float where the state is stored in fewer bits.
template <class F> void by_types(DType x, DType v, F f) {
  by_type(x, [&](auto type) {
    if (v == x) return f(type, type);
    if constexpr (sizeof(type) == 2) f(type, float());
  });
}

// The operators: checks in sentences, outputs, dispatch to the CPU or the GPU, and their registration with
// PyTorch's dispatcher. Written against PyTorch's stable ABI: its headers compile in two seconds (torch/extension.h
// takes half a minute), the library is loaded by torch.ops.load_library and needs neither Python's headers nor
// pybind11, and one build serves every later version of PyTorch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <iostream>
#include <mutex>
#include <optional>
#include <sstream>
#include <tuple>
#include <vector>

#include "norm.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- checks

template <class... Words> static void check(bool right, const Words&... words) {
  if (right) return;
  std::ostringstream sentence;
  (sentence << ... << words);
  throw std::runtime_error(sentence.str());
}

static std::string shape_of(const Tensor& x) {
  std::ostringstream s;
  for (int64_t i = 0; i < x.dim(); i++) s << (i ? ", " : "(") << x.size(i);
  s << (x.dim() ? ")" : "()");
  return s.str();
}

static DType storage(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: check(false, name, " must be a float32, bfloat16, float16 or float64 tensor."); return DType::f32;
  }
}

static void check_device(const Tensor& x, const Tensor& like, const char* name) {
  check(x.is_cuda() == like.is_cuda() && (x.is_cpu() || x.get_device() == like.get_device()), name, " must be on the device of the other tensors.");
}

static Shape shape(const Tensor& x, const char* name) {
  check(x.dim() == 4, name, " must have four dimensions, (B, C, H, W), not the shape ", shape_of(x), ".");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

static View view(const Tensor& x, const char* name) { return {x.data_ptr(), storage(x, name), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// x as a view, checked to be (B, C, H, W) on like's device.
static View view(const Tensor& x, const char* name, Shape s, const Tensor& like) {
  check_device(x, like, name);
  Shape is = shape(x, name);
  check(is.B == s.B && is.C == s.C && is.H == s.H && is.W == s.W, name, " must have the shape (", s.B, ", ", s.C, ", ", s.H, ", ", s.W, "), not ", shape_of(x), ".");
  return view(x, name);
}

static View view_of_type(const Tensor& x, const char* name, Shape s, const Tensor& like) {
  check(x.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensors.");
  return view(x, name, s, like);
}

template <class T> static PerImage<T> per_image(const Tensor& x, const char* name, const Tensor& like) {
  check_device(x, like, name);
  bool integer = std::is_same_v<T, int64_t>;
  check(x.scalar_type() == (integer ? ScalarType::Long : ScalarType::Float), name, " must be ", integer ? "int64" : "float32", ".");
  check(x.dim() == 1 && x.size(0) == like.size(0), name, " must have one value a picture, (", like.size(0), ",), not the shape ", shape_of(x), ".");
  return {static_cast<const T*>(x.data_ptr()), x.stride(0)};
}

static Step step(const MaybeTensor& per_picture, double number, const Tensor& like) {
  return {per_picture ? per_image<float>(*per_picture, "dt", like) : PerImage<float>{nullptr, 0}, number};
}

// The state x_t in the first half of the channels of x_in.
static Shape state(const Tensor& x_in) {
  Shape s = shape(x_in, "x_in");
  check(s.C % 2 == 0, "x_in must hold x_t and x_lr, so an even number of channels, not ", s.C, ".");
  s.C /= 2;
  return s;
}

// A velocity is stored like the state, or in float32.
static View velocity(const Tensor& v, const char* name, Shape s, const Tensor& x_in) {
  check(v.scalar_type() == x_in.scalar_type() || (v.scalar_type() == ScalarType::Float && x_in.scalar_type() != ScalarType::Double), name,
        " must have x_in's dtype or float32.");
  return view(v, name, s, x_in);
}

// ---- outputs and dispatch

static bool is_channels_last(const Tensor& x) { return x.stride(1) == 1 && !x.is_contiguous(); }

// Large outputs come fresh from the system, which hands them over page by page as they are first touched; in pages
// of 2 MiB instead of 4 KiB that takes a sixth of the time, and without this more than the kernel itself.
static void ask_for_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 1 << 21;
  uintptr_t begin = (uintptr_t(x.data_ptr()) + PAGE - 1) / PAGE * PAGE, end = (uintptr_t(x.data_ptr()) + x.numel() * x.element_size()) / PAGE * PAGE;
  if (x.is_cpu() && end > begin + 4 * PAGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// What PyTorch allocates in make(), or one sentence: PyTorch itself would write forty lines of its stack to std::cerr.
template <class F> static Tensor allocated(F make) {
  static std::mutex one_at_a_time;  // std::cerr is everybody's: two threads here could leave it silent
  std::lock_guard<std::mutex> guard(one_at_a_time);
  std::streambuf* terminal = std::cerr.rdbuf(nullptr);
  try {
    Tensor y = make();
    std::cerr.rdbuf(terminal);
    return y;
  } catch (const std::exception&) {
    std::cerr.rdbuf(terminal);
    throw std::runtime_error("the kernels cannot allocate memory for a tensor that they need.");
  }
}

static Tensor in_order(const Tensor& x, MemoryFormat format) { return allocated([&] { return torch::stable::contiguous(x, format); }); }

// An output of x's memory format.
static Tensor new_like(const Tensor& x, int64_t B, int64_t C) {
  MemoryFormat format = is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor y = allocated([&] { return torch::stable::empty({B, C, x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format); });
  ask_for_huge_pages(y);
  return y;
}

static Tensor new_vector(const Tensor& x, std::vector<int64_t> size, ScalarType dtype) {
  return allocated([&] { return torch::stable::empty(size, dtype, std::nullopt, x.device()); });
}

// Statistics, parameters and sums: float32, or float64 where x is.
static ScalarType arithmetic(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// launch(Cpu()) or, on x's device and PyTorch's current stream there, launch(Cuda{stream}).
template <class F> static void on_device(const Tensor& x, F launch) {
  if (x.is_cpu()) return launch(Cpu());
  check(x.is_cuda(), "the kernels run on CPU and CUDA tensors; for others choose OFTSR_KERNELS=torch.");
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  launch(Cuda{stream});
#else
  check(false, "these kernels were built without CUDA: install nvcc, or choose OFTSR_KERNELS=torch.");
#endif
}

// Where rows follow one another without a gap in every view, a picture is one long row: fewer, longer loops.
template <class... V> static Shape one_row(Shape s, const V&... views) {
  if (((views.h == s.W * views.w) && ...)) return {s.B, s.C, 1, s.H * s.W};
  return s;
}

static bool empty(Shape s) { return s.B * s.C * s.H * s.W == 0; }

// Sums are taken in two steps: up to PARTIAL_SUMS partial sums of each kind, then their sum.
static Tensor partial_sums(const Tensor& x, int64_t kinds) { return new_vector(x, {kinds * PARTIAL_SUMS}, ScalarType::Double); }

// ---- noise

static Tensor normal_(const Tensor& seeds, std::vector<int64_t> size, int64_t stream, int64_t h, int64_t w) {
  check(size.size() == 4, "the shape of noise is (B, C, H, W), four numbers, not ", size.size(), ".");
  Shape s{size[0], size[1], size[2], size[3]};
  Tensor out = new_vector(seeds, size, ScalarType::Float);
  PerImage<int64_t> seed = per_image<int64_t>(seeds, "seeds", out);
  if (!empty(s)) on_device(out, [&](auto device) { normal(device, s, seed, uint32_t(stream), Corner{h, w}, static_cast<float*>(out.data_ptr())); });
  return out;
}

static void check_sigma(double sigma_p) { check(sigma_p >= 0 && sigma_p <= 1, "sigma_p must lie in [0, 1], not ", sigma_p, "."); }

static Tensor noise_augment_(const Tensor& x_lr, double sigma_p, const Tensor& seeds, int64_t h, int64_t w) {
  check_sigma(sigma_p);
  Shape s = shape(x_lr, "x_lr");
  Tensor x_in = new_like(x_lr, s.B, 2 * s.C);
  View in = view(x_lr, "x_lr"), out = view(x_in, "x_in");
  PerImage<int64_t> seed = per_image<int64_t>(seeds, "seeds", x_lr);
  if (!empty(s)) on_device(x_lr, [&](auto device) { noise_augment(device, s, in, sigma_p, seed, Corner{h, w}, out); });
  return x_in;
}

static std::tuple<Tensor, Tensor> flow_training_pair_(const Tensor& x_1, const Tensor& x_lr, const Tensor& t, double sigma_p, const Tensor& seeds) {
  check_sigma(sigma_p);
  Shape s = shape(x_lr, "x_lr");
  View lr = view(x_lr, "x_lr"), hr = view_of_type(x_1, "x_1", s, x_lr);
  Tensor x_in = new_like(x_lr, s.B, 2 * s.C), v = new_like(x_1, s.B, s.C);
  View out = view(x_in, "x_in"), v_out = view(v, "v");
  PerImage<float> time = per_image<float>(t, "t", x_lr);
  PerImage<int64_t> seed = per_image<int64_t>(seeds, "seeds", x_lr);
  if (!empty(s)) on_device(x_lr, [&](auto device) { flow_training_pair(device, s, hr, lr, time, sigma_p, seed, out, v_out); });
  return {x_in, v};
}

// ---- solver steps

static void euler_step_(const Tensor& x_in, const Tensor& v, const MaybeTensor& dts, double dt) {
  Shape s = state(x_in);
  View x = view(x_in, "x_in"), slope = velocity(v, "v", s, x_in);
  Step d = step(dts, dt, x_in);
  if (!empty(s)) on_device(x_in, [&](auto device) { euler_step(device, one_row(s, x, slope), x, slope, d); });
}

static void rk2_stage_(const Tensor& x_in, const Tensor& v1, const Tensor& v2, const MaybeTensor& dts, double dt, double b1, double b2) {
  Shape s = state(x_in);
  View x = view(x_in, "x_in"), k1 = velocity(v1, "v1", s, x_in), k2 = velocity(v2, "v2", s, x_in);
  check(k1.dtype == k2.dtype, "v1 and v2 must have one dtype.");
  Step d = step(dts, dt, x_in);
  if (!empty(s)) on_device(x_in, [&](auto device) { rk2_stage(device, one_row(s, x, k1, k2), x, k1, k2, d, b1, b2); });
}

static Tensor student_state_(const Tensor& x_in, const Tensor& v, const Tensor& t) {
  Shape s = state(x_in);
  Tensor out = new_like(x_in, s.B, 2 * s.C);
  View x = view(x_in, "x_in"), slope = velocity(v, "v", s, x_in), x_out = view(out, "out");
  PerImage<float> time = per_image<float>(t, "t", x_in);
  if (!empty(s)) on_device(x_in, [&](auto device) { student_state(device, one_row(s, x, slope, x_out), x, slope, time, x_out); });
  return out;
}

// The velocities whose coefficients are not zero.
static Sum weighted(const std::vector<Tensor>& k, const std::vector<double>& coefficients, Shape s, const Tensor& x_in) {
  check(k.size() == coefficients.size() && !k.empty() && k.size() <= 7, "k must hold as many velocities as there are coefficients, 1 to 7, not ", k.size(), ".");
  Sum sum{};
  for (size_t i = 0; i < k.size(); i++) {
    if (coefficients[i] == 0) continue;
    sum.k[sum.n] = velocity(k[i], "k", s, x_in);
    sum.coefficient[sum.n] = coefficients[i];
    check(sum.k[sum.n].dtype == sum.k[0].dtype, "the velocities of k must have one dtype.");
    sum.n++;
  }
  return sum;
}

static Shape one_row_sum(Shape s, const View& x, const View& x_t, const Sum& sum) {
  Shape row = one_row(s, x, x_t);
  for (int i = 0; i < sum.n; i++) if (sum.k[i].h != s.W * sum.k[i].w) return s;
  return row;
}

static void dopri5_stage_(const Tensor& x_in, const Tensor& x_t, std::vector<Tensor> k, std::vector<double> a, double dt) {
  Shape s = state(x_in);
  View x = view(x_in, "x_in"), from = view_of_type(x_t, "x_t", s, x_in);
  Sum sum = weighted(k, a, s, x_in);
  if (!empty(s)) on_device(x_in, [&](auto device) { dopri5_stage(device, one_row_sum(s, x, from, sum), x, from, sum, dt); });
}

static Tensor dopri5_error_(const Tensor& x_in, const Tensor& x_t, std::vector<Tensor> k, std::vector<double> e, double dt, double atol, double rtol) {
  Shape s = state(x_in);
  check(!empty(s), "the error of an empty step is not defined: x_in has the shape ", shape_of(x_in), ".");
  View x = view(x_in, "x_in"), from = view_of_type(x_t, "x_t", s, x_in);
  Sum sum = weighted(k, e, s, x_in);
  Tensor out = new_vector(x_in, {}, ScalarType::Double), partial = partial_sums(x_in, 1);
  on_device(x_in, [&](auto device) {
    dopri5_error(device, one_row_sum(s, x, from, sum), x, from, sum, dt, atol, rtol, static_cast<double*>(partial.data_ptr()), static_cast<double*>(out.data_ptr()));
  });
  return out;
}

// ---- distillation

static Tensor distill_target_(const Tensor& v_phi, const Tensor& v_theta, const Tensor& t, const Tensor& s) {
  Shape size = shape(v_phi, "v_phi");
  Tensor out = new_like(v_phi, size.B, size.C);
  View phi = view(v_phi, "v_phi"), theta = view_of_type(v_theta, "v_theta", size, v_phi), target = view(out, "out");
  PerImage<float> from = per_image<float>(t, "t", v_phi), to = per_image<float>(s, "s", v_phi);
  if (!empty(size)) on_device(v_phi, [&](auto device) { distill_target(device, one_row(size, phi, theta, target), phi, theta, from, to, target); });
  return out;
}

// Everything that Eq. (12) reads.
struct Distillation {
  Shape size;  // of one B
  View phi, step, theta;
  PerImage<float> t, s;
};

static Distillation distillation(const Tensor& v_phi, const Tensor& v_step, const Tensor& v_theta, const Tensor& t, const Tensor& s) {
  Shape one = shape(v_step, "v_step"), two = one, three = one;
  check(!empty(one), "the mean over no elements is not defined: v_step has the shape ", shape_of(v_step), ".");
  two.B = 2 * one.B, three.B = 3 * one.B;
  return {one, view_of_type(v_phi, "v_phi", three, v_step), view(v_step, "v_step"), view_of_type(v_theta, "v_theta", two, v_step),
          per_image<float>(t, "t", v_step), per_image<float>(s, "s", v_step)};
}

static Tensor distill_loss_(const Tensor& v_phi, const Tensor& v_step, const Tensor& v_theta, const Tensor& t, const Tensor& s) {
  Distillation d = distillation(v_phi, v_step, v_theta, t, s);
  Tensor out = new_vector(v_phi, {3}, arithmetic(v_phi)), partial = partial_sums(v_phi, 3);
  on_device(v_phi, [&](auto device) {
    distill_loss(device, one_row(d.size, d.phi, d.step, d.theta), d.phi, d.step, d.theta, d.t, d.s, static_cast<double*>(partial.data_ptr()), out.data_ptr());
  });
  return out;
}

static Tensor distill_loss_backward_(const Tensor& grad, const Tensor& v_phi, const Tensor& v_step, const Tensor& v_theta, const Tensor& t, const Tensor& s) {
  Distillation d = distillation(v_phi, v_step, v_theta, t, s);
  check(grad.dim() == 1 && grad.size(0) == 3 && grad.is_contiguous() && grad.scalar_type() == arithmetic(v_phi), "grad must be three numbers of the losses' dtype.");
  check_device(grad, v_phi, "grad");
  Tensor out = new_like(v_phi, v_phi.size(0), v_phi.size(1));
  View dphi = view(out, "out");
  on_device(v_phi, [&](auto device) {
    distill_loss_backward(device, one_row(d.size, d.phi, d.step, d.theta, dphi), grad.data_ptr(), d.phi, d.step, d.theta, d.t, d.s, dphi);
  });
  return out;
}

// ---- the norm-activation

// The distance of neighbouring pixels, when all neighbours are at one distance.
static int64_t pixel_stride(const Tensor& x) { return x.stride(x.size(3) > 1 ? 3 : 2); }

// x as it is when its pixels lie at one distance, and channels or pixels next to one another; else a copy.
static Tensor regular(const Tensor& x) {
  bool rows = x.size(2) <= 1 || x.size(3) <= 1 || x.stride(2) == x.size(3) * x.stride(3), last = x.stride(1) == 1, first = pixel_stride(x) == 1;
  if (rows && (last || first)) return x;
  return in_order(x, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

static const void* parameter(const Tensor& p, const char* name, const Tensor& x, std::vector<int64_t> size) {
  check_device(p, x, name);
  check(p.scalar_type() == arithmetic(x), name, " must be float32 (float64 where x is).");
  bool fits = p.dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); i++) fits = p.size(i) == size[i];
  check(fits && (p.size(p.dim() - 1) <= 1 || p.stride(p.dim() - 1) == 1), name, " must have the shape (", size.size() > 1 ? "B, C" : "C",
        ") with its channels next to one another; it has the shape ", shape_of(p), ".");
  return p.data_ptr();
}

static Norm norm(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias, const MaybeTensor& scale, const MaybeTensor& shift, const Tensor& mean,
                 const Tensor& rstd) {
  Shape s = shape(x, "x");
  check(groups > 0 && s.C % groups == 0, "the ", s.C, " channels of x do not make ", groups, " equal groups.");
  check(scale.has_value() == shift.has_value(), "scale and shift must be given together.");
  Norm a{s.B, s.C, s.H * s.W, groups, view(x, "x"), parameter(weight, "weight", x, {s.C}), parameter(bias, "bias", x, {s.C})};
  if (scale) {
    a.scale = parameter(*scale, "scale", x, {s.B, s.C});
    a.shift = parameter(*shift, "shift", x, {s.B, s.C});
    a.scale_stride = scale->stride(0);
    a.shift_stride = shift->stride(0);
  }
  a.x.w = pixel_stride(x);
  a.mean = const_cast<void*>(parameter(mean, "mean", x, {s.B, groups}));
  a.rstd = const_cast<void*>(parameter(rstd, "rstd", x, {s.B, groups}));
  return a;
}

static std::tuple<Tensor, Tensor, Tensor> group_norm_silu_(const Tensor& x_any, int64_t groups, const Tensor& weight, const Tensor& bias, const MaybeTensor& scale,
                                                           const MaybeTensor& shift, double eps) {
  Shape s = shape(x_any, "x");
  Tensor x = regular(x_any), y = new_like(x_any, s.B, s.C);
  Tensor mean = new_vector(x, {s.B, groups}, arithmetic(x)), rstd = new_vector(x, {s.B, groups}, arithmetic(x));
  Norm a = norm(x, groups, weight, bias, scale, shift, mean, rstd);
  View out = view(y, "y");
  out.w = pixel_stride(y);
  Tensor work = new_vector(x, {norm_workspace(a)}, ScalarType::Double);
  on_device(x, [&](auto device) { group_norm_silu(device, a, eps, static_cast<double*>(work.data_ptr()), out); });
  return {y, mean, rstd};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_(const Tensor& dy_any, const Tensor& x_any, int64_t groups, const Tensor& weight,
                                                                                    const Tensor& bias, const MaybeTensor& scale, const MaybeTensor& shift,
                                                                                    const Tensor& mean, const Tensor& rstd) {
  Tensor x = regular(x_any), dx = new_like(x_any, x.size(0), x.size(1));
  Norm a = norm(x, groups, weight, bias, scale, shift, mean, rstd);
  view_of_type(dy_any, "dy", shape(x, "x"), x);
  Tensor dy = in_order(dy_any, a.x.c == 1 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  View dy_view = view(dy, "dy"), dx_view = view(dx, "dx");
  dy_view.w = pixel_stride(dy), dx_view.w = pixel_stride(dx);
  Tensor dweight = new_vector(x, {a.C}, arithmetic(x)), dbias = new_vector(x, {a.C}, arithmetic(x));
  std::vector<int64_t> per_picture{scale ? a.B : 0, a.C};
  Tensor dscale = new_vector(x, per_picture, arithmetic(x)), dshift = new_vector(x, per_picture, arithmetic(x));
  Tensor work = new_vector(x, {norm_workspace(a)}, ScalarType::Double);
  on_device(x, [&](auto device) {
    group_norm_silu_backward(device, a, dy_view, static_cast<double*>(work.data_ptr()), dx_view, dweight.data_ptr(), dbias.data_ptr(),
                             scale ? dscale.data_ptr() : nullptr, scale ? dshift.data_ptr() : nullptr);
  });
  return {dx, dweight, dbias, dscale, dshift};
}

// ---- the convolution

// x's values, checked to be what conv3x3 takes, in channels_last memory that `kept` holds.
static float* conv_values(const Tensor& x, const char* name, Tensor& kept) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Float, name, " must be a float32 tensor on the CPU.");
  shape(x, name);
  kept = in_order(x, MemoryFormat::ChannelsLast);
  return static_cast<float*>(kept.data_ptr());
}

static void check_channels(int64_t C, int64_t O) { check(C && O && C % 32 == 0 && O % 32 == 0, "convolutions here take multiples of 32 channels, not ", C, " to ", O, "."); }

static Tensor new_last(const Tensor& like, std::vector<int64_t> size) {
  Tensor y = allocated([&] { return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast); });
  ask_for_huge_pages(y);
  return y;
}

static Tensor conv3x3_(const Tensor& x, const Tensor& weight, const Tensor& bias, bool doubled) {
  Tensor x_kept, weight_kept;
  const float *in = conv_values(x, "x", x_kept), *kernel = conv_values(weight, "weight", weight_kept);
  Shape s = shape(x, "x"), k = shape(weight, "weight");
  check_channels(s.C, k.B);
  check(k.C == s.C && k.H == 3 && k.W == 3, "weight must have the shape (O, ", s.C, ", 3, 3), not ", shape_of(weight), ".");
  const void* offset = parameter(bias, "bias", x, {k.B});
  s.H <<= doubled, s.W <<= doubled;
  Tensor y = new_last(x, {s.B, k.B, s.H, s.W});
  if (!empty(s)) conv3x3(s, k.B, in, kernel, static_cast<const float*>(offset), static_cast<float*>(y.data_ptr()), doubled);
  return y;
}

// h + the 1x1 convolution of x to y, which may be h.
static void add_conv1x1_to(const Tensor& y, const Tensor& h, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  Tensor h_kept, x_kept, weight_kept;
  const float *before = conv_values(h, "h", h_kept), *in = conv_values(x, "x", x_kept), *kernel = conv_values(weight, "weight", weight_kept);
  Shape s = shape(x, "x"), k = shape(weight, "weight");
  check(k.C == s.C && k.H == 1 && k.W == 1, "weight must have the shape (O, ", s.C, ", 1, 1), not ", shape_of(weight), ".");
  check_channels(s.C, k.B);
  view_of_type(h, "h", {s.B, k.B, s.H, s.W}, x);
  View out = view_of_type(y, "h", {s.B, k.B, s.H, s.W}, x);
  check(out.c == 1 && out.w == k.B && out.h == s.W * k.B && out.b == s.H * out.h, "h must lie in channels_last memory.");
  const void* offset = parameter(bias, "bias", x, {k.B});
  if (!empty(s)) add_conv1x1(s.B * s.H * s.W, s.C, k.B, before, in, kernel, static_cast<const float*>(offset), static_cast<float*>(y.data_ptr()));
}

static void add_conv1x1_(const Tensor& h, const Tensor& x, const Tensor& weight, const Tensor& bias) { add_conv1x1_to(h, h, x, weight, bias); }

static Tensor add_conv1x1_new_(const Tensor& h, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  Shape s = shape(h, "h");
  Tensor y = new_last(h, {s.B, s.C, s.H, s.W});
  add_conv1x1_to(y, h, x, weight, bias);
  return y;
}

// U: the transformed weight, as kernels.h says.
static Tensor conv3x3_bf16_(const Tensor& x, const Tensor& U, const Tensor& bias, bool doubled) {
  Shape s = shape(x, "x");
  int64_t O = U.dim() == 5 ? 32 * U.size(1) : 0;
  check(x.is_cpu() && x.scalar_type() == ScalarType::BFloat16, "x must be a bfloat16 tensor on the CPU.");
  check(U.is_cpu() && U.scalar_type() == ScalarType::BFloat16 && U.is_contiguous() && O && U.numel() == 36 * s.C * O,
        "U must be a transformed weight, bfloat16 (36, O / 32, ", s.C / 2, ", 32, 2), not ", shape_of(U), ".");
  check_channels(s.C, O);
  check(bias.is_cpu() && bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == O, "bias must be float32 of the shape (", O, ",), not ", shape_of(bias), ".");
  s.H <<= doubled, s.W <<= doubled;
  Tensor kept = in_order(x, MemoryFormat::ChannelsLast), y = new_last(x, {s.B, O, s.H, s.W});
  check(multiplies_in_bf16(), "this library was not compiled for a processor that multiplies in bfloat16.");
  if (!empty(s)) conv3x3_bf16(s, O, static_cast<const bf16*>(kept.data_ptr()), static_cast<const bf16*>(U.data_ptr()), static_cast<const float*>(bias.data_ptr()),
                              static_cast<bf16*>(y.data_ptr()), doubled);
  return y;
}

// The gradients of a convolution with kernels of side x side.
static Tensor input_gradient(const Tensor& dy, const Tensor& weight, int64_t side) {
  Tensor dy_kept, weight_kept;
  const float *gradient = conv_values(dy, "dy", dy_kept), *kernel = conv_values(weight, "weight", weight_kept);
  Shape d = shape(dy, "dy"), k = shape(weight, "weight");
  check_channels(k.C, d.C);
  check(k.B == d.C && k.H == side && k.W == side, "weight must have the shape (", d.C, ", C, ", side, ", ", side, "), not ", shape_of(weight), ".");
  Tensor dx = new_last(dy, {d.B, k.C, d.H, d.W});
  float* out = static_cast<float*>(dx.data_ptr());
  if (empty(d)) return dx;
  if (side == 3) conv3x3_input_gradient(d, k.C, gradient, kernel, out);
  else conv1x1_input_gradient(d.B * d.H * d.W, k.C, d.C, gradient, kernel, out);
  return dx;
}

static Tensor weight_gradient(const Tensor& x, const Tensor& dy, int64_t side, bool doubled) {
  Tensor x_kept, dy_kept;
  const float *in = conv_values(x, "x", x_kept), *gradient = conv_values(dy, "dy", dy_kept);
  Shape s = shape(x, "x"), d = shape(dy, "dy");
  check_channels(s.C, d.C);
  s.H <<= doubled, s.W <<= doubled;
  check(d.B == s.B && d.H == s.H && d.W == s.W, "dy must have the shape (", s.B, ", O, ", s.H, ", ", s.W, "), not ", shape_of(dy), ".");
  Tensor dweight = new_last(x, {d.C, s.C, side, side});
  float* out = static_cast<float*>(dweight.data_ptr());
  if (side == 3) conv3x3_weight_gradient(s, d.C, in, gradient, out, doubled);
  else conv1x1_weight_gradient(s.B * s.H * s.W, s.C, d.C, in, gradient, out);
  return dweight;
}

static Tensor conv3x3_input_gradient_(const Tensor& dy, const Tensor& weight) { return input_gradient(dy, weight, 3); }
static Tensor conv3x3_weight_gradient_(const Tensor& x, const Tensor& dy, bool doubled) { return weight_gradient(x, dy, 3, doubled); }
static Tensor conv1x1_input_gradient_(const Tensor& dy, const Tensor& weight) { return input_gradient(dy, weight, 1); }
static Tensor conv1x1_weight_gradient_(const Tensor& x, const Tensor& dy) { return weight_gradient(x, dy, 1, false); }

// ---- what happens to pictures in the world

// The data of a tensor of that dtype and size on the CPU, in contiguous memory that `kept` holds.
template <class T> static const T* values(const Tensor& x, const char* name, ScalarType dtype, std::vector<int64_t> size, Tensor& kept) {
  bool fits = x.is_cpu() && x.scalar_type() == dtype && x.dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); i++) fits = x.size(i) == size[i];
  std::ostringstream wanted;
  for (size_t i = 0; i < size.size(); i++) wanted << (i ? ", " : "(") << size[i];
  check(fits, name, " must be ", dtype == ScalarType::Float ? "float32" : dtype == ScalarType::Double ? "float64" : dtype == ScalarType::Long ? "int64" : "int16",
        " on the CPU, of the shape ", wanted.str(), "), not ", shape_of(x), ".");
  kept = torch::stable::contiguous(x);
  return static_cast<const T*>(kept.data_ptr());
}

static Tensor damage_(const Tensor& x_1, const Tensor& seeds, const Tensor& first, const Tensor& stages, const Tensor& filters, const Tensor& steps, int64_t h, int64_t w) {
  Shape s = shape(x_1, "x_1");
  check(s.C == 3, "x_1 must have 3 channels, not ", s.C, ".");
  int64_t count = stages.dim() == 2 ? stages.size(0) : 0, taps = filters.dim() == 1 ? filters.size(0) : 0, cells = steps.dim() == 3 ? steps.size(2) : 0;
  Tensor kept[5], y = new_vector(x_1, {s.B, 3, h, w}, ScalarType::Float);
  const float *in = values<float>(x_1, "x_1", ScalarType::Float, {s.B, 3, s.H, s.W}, kept[0]), *f = values<float>(filters, "filters", ScalarType::Float, {taps}, kept[1]);
  const int64_t* begin = values<int64_t>(first, "first", ScalarType::Long, {s.B + 1}, kept[2]);
  const int16_t* q = values<int16_t>(steps, "steps", ScalarType::Short, {9, 256, cells}, kept[3]);
  const Stage* stage = reinterpret_cast<const Stage*>(values<double>(stages, "stages", ScalarType::Double, {count, 5}, kept[4]));
  for (int64_t b = 0; b <= s.B; b++) check(begin[b] >= (b ? begin[b - 1] : 0) && begin[b] <= count, "first must rise from 0 to the number of stages, ", count, ".");
  for (const Stage* d = stage; d < stage + count; d++) {
    int kind = int(d->kind);
    if (kind == Stage::BLUR)
      check(d->a >= 3 && int64_t(d->a) % 2 == 1 && d->b >= 0 && d->b + d->a * d->a <= taps, "a filter must be of k x k with k odd, 3 at least, and lie in the ", taps, " of filters.");
    else if (kind == Stage::RESIZE)
      check(d->a >= 0 && d->a <= int(Method::antialiased) && (d->d > 0 || (d->b >= 1 && d->c >= 1)), "a resizing must name a method, 0 to 3, and a size or a ratio.");
    else
      check(kind == Stage::NOISE || kind == Stage::JPEG, "a stage must be of the kind 0 to 3, not ", kind, ".");
  }
  PerImage<int64_t> seed = per_image<int64_t>(seeds, "seeds", y);
  if (!empty(s)) damage(s, begin, stage, f, cells, q, seed, h, w, in, static_cast<float*>(y.data_ptr()));
  return y;
}

// ---- pictures

static Tensor to_uint8_(const Tensor& x) {
  Shape s = shape(x, "x");
  View in = view(x, "x");
  Tensor out = new_vector(x, {s.B, s.H, s.W, s.C}, ScalarType::Byte);
  if (in.c == 1 && in.w == s.C && in.h == s.W * s.C) {  // channels last already: one row of values
    s = {s.B, 1, 1, s.H * s.W * s.C};
    in = {in.data, in.dtype, in.b, 1, 1, 1};
  }
  if (!empty(s)) on_device(x, [&](auto device) { to_uint8(device, one_row(s, in), in, static_cast<uint8_t*>(out.data_ptr())); });
  return out;
}

// ---- registration: a schema each, and one implementation for both devices (on_device chooses)

STABLE_TORCH_LIBRARY(oftsr, m) {
  m.def("normal(Tensor seeds, int[] shape, int stream, int h=0, int w=0) -> Tensor");
  m.def("noise_augment(Tensor x_lr, float sigma_p, Tensor seeds, int h=0, int w=0) -> Tensor");
  m.def("flow_training_pair(Tensor x_1, Tensor x_lr, Tensor t, float sigma_p, Tensor seeds) -> (Tensor, Tensor)");
  m.def("euler_step_(Tensor(a!) x_in, Tensor v, Tensor? dts, float dt) -> ()");
  m.def("rk2_stage_(Tensor(a!) x_in, Tensor v1, Tensor v2, Tensor? dts, float dt, float b1, float b2) -> ()");
  m.def("student_state(Tensor x_in, Tensor v, Tensor t) -> Tensor");
  m.def("dopri5_stage_(Tensor(a!) x_in, Tensor x_t, Tensor[] k, float[] a, float dt) -> ()");
  m.def("dopri5_error(Tensor x_in, Tensor x_t, Tensor[] k, float[] e, float dt, float atol, float rtol) -> Tensor");
  m.def("distill_target(Tensor v_phi, Tensor v_theta, Tensor t, Tensor s) -> Tensor");
  m.def("distill_loss(Tensor v_phi, Tensor v_step, Tensor v_theta, Tensor t, Tensor s) -> Tensor");
  m.def("distill_loss_backward(Tensor grad, Tensor v_phi, Tensor v_step, Tensor v_theta, Tensor t, Tensor s) -> Tensor");
  m.def("group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("group_norm_silu_backward(Tensor dy, Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor bias, bool doubled) -> Tensor");
  m.def("add_conv1x1(Tensor h, Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("add_conv1x1_(Tensor(a!) h, Tensor x, Tensor weight, Tensor bias) -> ()");
  m.def("conv1x1_input_gradient(Tensor dy, Tensor weight) -> Tensor");
  m.def("conv1x1_weight_gradient(Tensor x, Tensor dy) -> Tensor");
  m.def("multiplies_in_bf16() -> bool");
  m.def("conv3x3_bf16(Tensor x, Tensor U, Tensor bias, bool doubled) -> Tensor");
  m.def("conv3x3_input_gradient(Tensor dy, Tensor weight) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor x, Tensor dy, bool doubled) -> Tensor");
  m.def("to_uint8(Tensor x) -> Tensor");
  m.def("damage(Tensor x_1, Tensor seeds, Tensor first, Tensor stages, Tensor filters, Tensor steps, int h, int w) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oftsr, CompositeExplicitAutograd, m) {
  m.impl("normal", TORCH_BOX(&normal_));
  m.impl("noise_augment", TORCH_BOX(&noise_augment_));
  m.impl("flow_training_pair", TORCH_BOX(&flow_training_pair_));
  m.impl("euler_step_", TORCH_BOX(&euler_step_));
  m.impl("rk2_stage_", TORCH_BOX(&rk2_stage_));
  m.impl("student_state", TORCH_BOX(&student_state_));
  m.impl("dopri5_stage_", TORCH_BOX(&dopri5_stage_));
  m.impl("dopri5_error", TORCH_BOX(&dopri5_error_));
  m.impl("distill_target", TORCH_BOX(&distill_target_));
  m.impl("distill_loss", TORCH_BOX(&distill_loss_));
  m.impl("distill_loss_backward", TORCH_BOX(&distill_loss_backward_));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_));
  m.impl("conv3x3", TORCH_BOX(&conv3x3_));
  m.impl("add_conv1x1", TORCH_BOX(&add_conv1x1_new_));
  m.impl("add_conv1x1_", TORCH_BOX(&add_conv1x1_));
  m.impl("conv1x1_input_gradient", TORCH_BOX(&conv1x1_input_gradient_));
  m.impl("conv1x1_weight_gradient", TORCH_BOX(&conv1x1_weight_gradient_));
  m.impl("conv3x3_bf16", TORCH_BOX(&conv3x3_bf16_));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&conv3x3_input_gradient_));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient_));
  m.impl("to_uint8", TORCH_BOX(&to_uint8_));
  m.impl("damage", TORCH_BOX(&damage_));
}

STABLE_TORCH_LIBRARY_IMPL(oftsr, CompositeImplicitAutograd, m) { m.impl("multiplies_in_bf16", TORCH_BOX(&multiplies_in_bf16)); }

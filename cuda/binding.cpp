// The ops that kernels.py declares: check what comes in, make room for what goes out, start.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>
#include "launchers.h"
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
#ifdef CUDA_ON_CPU
extern "C" int cuda_on_cpu_blocks;
struct Device {
  at::Device where;
  cudaStream_t stream = nullptr;
  int blocks = cuda_on_cpu_blocks, major = 9;
  explicit Device(const Tensor& x) : where(x.device()) {}
};
#define BACKEND CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
struct Device {                          // the tensor's, until the end of the op
  at::Device where;
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int blocks, major;
  explicit Device(const Tensor& x) : where(x.device()), guard(where) {
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, x.get_device());
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device());
  }
};
#define BACKEND CUDA
#endif
// An argument, which must be what a kernel expects; if not, the message names it.
void check_dims(const char* name, const Tensor& x, int dims) {
  TORCH_CHECK(x.dim() == dims, name, ": expected ", dims, " dimensions, got ", x.sizes());
}
template <class T>
T* data(const Device& device, const char* name, const Tensor& x, at::ScalarType type,
        at::IntArrayRef sizes, int alignment = 16) {
  TORCH_CHECK(x.device() == device.where, name, " is on ", x.device(), ", not ", device.where);
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == sizes, name, ": expected ", type, sizes,
              ", got ", x.scalar_type(), x.sizes());
  TORCH_CHECK(x.is_contiguous() && (uintptr_t)x.data_ptr() % alignment == 0, name,
              " is not contiguous, or does not begin at a multiple of ", alignment, " bytes");
  return (T*)x.data_ptr();
}
float* floats(const Device& device, const char* name, const Tensor& x, at::IntArrayRef sizes) {
  return data<float>(device, name, x, at::kFloat, sizes, 4);
}
// Their values must be from `least` to `most`. On a GPU they are not read: that would be a wait.
int* ints(const Device& device, const char* name, const Tensor& x, at::IntArrayRef sizes,
          int64_t least, int64_t most) {
  int* found = data<int>(device, name, x, at::kInt, sizes, 4);
  for (int64_t i = 0; device.where.is_cpu() && i < x.numel(); i++)
    TORCH_CHECK(least <= found[i] && found[i] <= most, name, ": ", found[i], " is not in [", least,
                ", ", most, "]");
  return found;
}

std::tuple<Tensor, Tensor> route_op(const Tensor& gates) {
  Device device(gates);
  check_dims("gates", gates, 2);
  int64_t n = gates.size(0), E = gates.size(1);
  TORCH_CHECK(E <= 48 && n * E < 1ll << 31, "gates: at most 48 experts and 2^31 gates");
  auto slot = at::empty({n, E}, gates.options().dtype(at::kInt));
  auto offs = at::empty({E}, slot.options());
  route(floats(device, "gates", gates, {n, E}), n, E, slot.data_ptr<int>(), offs.data_ptr<int>(),
        device.stream);
  return {slot, offs};
}

// What the ops on rows share. Of `in` and `out` one is (n, d), the other (R, d).
Rows shared(const Device& device, const char* name, const Tensor& in, int64_t rows,
            const Tensor& slot, int64_t R, const MaybeTensor& gates, const Tensor& out) {
  int n = slot.size(0), E = slot.size(1), d = in.size(1);
  auto type = in.scalar_type();
  TORCH_CHECK(type == at::kBFloat16 || type == at::kFloat, name, ": expected bf16 or fp32");
  TORCH_CHECK(d * in.element_size() % 16 == 0, name, ": rows must be multiples of 16 bytes");
  return {n, E, d, type == at::kBFloat16, ints(device, "slot", slot, {n, E}, -1, R - 1),
          gates ? floats(device, "gates", *gates, {n, E}) : nullptr,
          data<void>(device, name, in, type, {rows, d}), nullptr, out.data_ptr(), nullptr,
          device.stream};
}
Tensor permute_op(const Tensor& x, const Tensor& slot, int64_t n_routed) {
  Device device(x);
  check_dims("x", x, 2), check_dims("slot", slot, 2);
  TORCH_CHECK(n_routed >= 0, "n_routed is negative");
  auto out = at::empty({n_routed, x.size(1)}, x.options());
  Rows rows = shared(device, "x", x, slot.size(0), slot, n_routed, {}, out);
  if (x.numel()) permute(rows);
  return out;
}
Tensor unpermute_op(const Tensor& y, const Tensor& slot, const MaybeTensor& gates) {
  Device device(y);
  check_dims("y", y, 2), check_dims("slot", slot, 2);
  auto out = at::empty({slot.size(0), y.size(1)}, y.options());
  Rows rows = shared(device, "y", y, y.size(0), slot, y.size(0), gates, out);
  if (out.numel()) unpermute(rows);
  return out;
}
std::tuple<Tensor, Tensor> unpermute_grad_op(const Tensor& grad, const Tensor& y,
                                             const Tensor& slot, const Tensor& gates) {
  Device device(y);
  check_dims("y", y, 2), check_dims("slot", slot, 2), check_dims("grad", grad, 2);
  auto dy = at::empty(y.sizes(), y.options()), dgates = at::empty(gates.sizes(), gates.options());
  Rows rows = shared(device, "grad", grad, slot.size(0), slot, y.size(0), gates, dy);
  rows.y = data<void>(device, "y", y, grad.scalar_type(), {y.size(0), rows.d});
  rows.dgates = dgates.data_ptr<float>();
  if (grad.numel()) unpermute_grad(rows);
  return {dy, dgates};
}

// Compute capability 9.0 has gmm.cu, all others pipelined.cu. Tests and the bench set this to 8, by
// ctypes, for the latter on 9.0 too; 0: the device's own.
extern "C" { int medmoe_major = 0; }

// One of the three products of launchers.h -> its out[0], and with an activation out[1], out[2];
// but nothing in these where no backward can follow: in torch.inference_mode(), forward.
std::vector<Tensor> gmm_op(int64_t product, int64_t act, const Tensor& a, const Tensor& b,
                           const MaybeTensor& up, const MaybeTensor& bias, const MaybeTensor& z,
                           const MaybeTensor& u, const Tensor& offs) {
  Device device(a);
  bool forward = product == kForward, weight = product == kWeightGrad;
  TORCH_CHECK(kForward <= product && product <= kWeightGrad, "product: no such one: ", product);
  TORCH_CHECK(kNone <= act && act <= (weight ? kNone : kSilu), "activation: no such one: ", act);
  check_dims("a", a, 2), check_dims("b", b, weight ? 2 : 3), check_dims("offs", offs, 1);
  int64_t R = a.size(0), E = offs.size(0), d = b.size(-1), f = forward ? b.size(1) : a.size(1);
  TORCH_CHECK(f % 8 == 0 && d % 8 == 0 && f && d, "a, b: widths must be multiples of 8");
  std::vector<int64_t> w = {E, f, d}, wide = {R, f}, narrow = {R, d};
  auto shape = forward ? wide : weight ? w : narrow;
  auto bf16s = [&](const char* name, const Tensor& x, at::IntArrayRef sizes) {
    return data<bf16>(device, name, x, at::kBFloat16, sizes);
  };
  auto maybe = [&](const char* name, const MaybeTensor& x, bool is_read, at::IntArrayRef sizes) {
    TORCH_CHECK(x.has_value() == is_read, name, is_read ? " is missing" : " is not used here");
    return x ? bf16s(name, *x, sizes) : nullptr;
  };
  Gmm g{(int)E, (int)f, (int)d, (int)R, ints(device, "offs", offs, {E}, 0, R)};
  g.a = bf16s("a", a, forward ? narrow : wide);
  g.b = bf16s("b", b, weight ? narrow : w);
  g.up = maybe("up", up, forward && act == kSilu, w);
  g.bias = maybe("bias", bias, bias && forward && act != kSilu, {E, f});
  g.z = maybe("z", z, product == kInputGrad && act != kNone, shape);
  g.u = maybe("u", u, product == kInputGrad && act == kSilu, shape);
  g.blocks = device.blocks, g.stream = device.stream;
  bool kept = !forward || !c10::InferenceMode::is_enabled();
  std::vector<Tensor> out;
  for (int i = 0; i <= act; i++) {
    out.push_back(at::empty(i == 0 || kept ? shape : std::vector<int64_t>{0}, a.options()));
    g.out[i] = i == 0 || kept ? (bf16*)out[i].data_ptr() : nullptr;
  }
  bool is_hopper = (medmoe_major ? medmoe_major : device.major) == 9;
  if (R) (is_hopper ? gmm : gmm_sm80)(g, (Product)product, (Activation)act);
  else if (weight) out[0].zero_();
  return out;
}

TORCH_LIBRARY_IMPL(medmoe, BACKEND, m) {
  m.impl("route", route_op);
  m.impl("permute", permute_op);
  m.impl("unpermute", unpermute_op);
  m.impl("unpermute_grad", unpermute_grad_op);
  m.impl("gmm", gmm_op);
}

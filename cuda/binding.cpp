// The ops that kernels.py declares: check what comes in, make room for what goes out, start.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include "launchers.h"
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

#ifdef CUDA_ON_CPU
extern "C" int cuda_on_cpu_blocks;
struct Device {
  explicit Device(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int blocks = cuda_on_cpu_blocks;
};
#define BACKEND CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
struct Device {                          // the tensor's, until the end of the op
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int blocks;
  explicit Device(const Tensor& x) : guard(x.device()) {
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, x.get_device());
  }
};
#define BACKEND CUDA
#endif

template <class T> T* data(const Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == sizes, "expected ", type, " ", sizes,
              ", got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(x.is_contiguous() && (uintptr_t)x.data_ptr() % 16 == 0,
              "expected a contiguous tensor that begins at a multiple of 16 bytes");
  return (T*)x.data_ptr();
}
bf16* bf16s(const Tensor& x, at::IntArrayRef sizes) { return data<bf16>(x, at::kBFloat16, sizes); }
int* ints(const Tensor& x, at::IntArrayRef sizes) { return data<int>(x, at::kInt, sizes); }
float* floats(const Tensor& x, at::IntArrayRef sizes) { return data<float>(x, at::kFloat, sizes); }

std::tuple<Tensor, Tensor> route_op(const Tensor& gates) {
  Device device(gates);
  int64_t n = gates.size(0), E = gates.size(1);
  TORCH_CHECK(E <= 48 && n * E < 1ll << 31, "at most 48 experts and 2^31 gates");
  auto slot = at::empty({n, E}, gates.options().dtype(at::kInt));
  auto offs = at::empty({E}, slot.options());
  route(floats(gates, {n, E}), n, E, ints(slot, {n, E}), ints(offs, {E}), device.stream);
  return {slot, offs};
}

// What the ops on rows share; `any` is one of their matrices, x (n, d) or y (R, d).
Rows shared(const Device& device, const Tensor& any, const Tensor& slot, const MaybeTensor& gates) {
  int n = slot.size(0), E = slot.size(1), d = any.size(1);
  bool is_bf16 = any.scalar_type() == at::kBFloat16;
  TORCH_CHECK(is_bf16 || any.scalar_type() == at::kFloat, "expected bf16 or fp32");
  TORCH_CHECK(d * any.element_size() % 16 == 0, "rows must be multiples of 16 bytes");
  return {n, E, d, is_bf16, ints(slot, {n, E}), gates ? floats(*gates, {n, E}) : nullptr,
          nullptr, nullptr, nullptr, nullptr, device.stream};
}
Tensor permute_op(const Tensor& x, const Tensor& slot, int64_t n_visits) {
  Device device(x);
  auto out = at::empty({n_visits, x.size(1)}, x.options());
  Rows r = shared(device, x, slot, {});
  r.x = data<void>(x, x.scalar_type(), {r.n, r.d}), r.out = out.data_ptr();
  if (r.n) permute(r);
  return out;
}
Tensor unpermute_op(const Tensor& y, const Tensor& slot, const MaybeTensor& gates) {
  Device device(y);
  auto out = at::empty({slot.size(0), y.size(1)}, y.options());
  Rows r = shared(device, y, slot, gates);
  r.y = data<void>(y, y.scalar_type(), y.sizes()), r.out = out.data_ptr();
  if (r.n) unpermute(r);
  return out;
}
std::tuple<Tensor, Tensor> unpermute_grad_op(const Tensor& grad, const Tensor& y,
                                             const Tensor& slot, const Tensor& gates) {
  Device device(y);
  auto dy = at::empty(y.sizes(), y.options()), dgates = at::empty(gates.sizes(), gates.options());
  Rows r = shared(device, y, slot, gates);
  r.x = data<void>(grad, y.scalar_type(), {r.n, r.d});
  r.y = data<void>(y, y.scalar_type(), y.sizes());
  r.out = dy.data_ptr(), r.dgates = floats(dgates, {r.n, r.E});
  if (r.n) unpermute_grad(r);
  return {dy, dgates};
}

// One of the three products of launchers.h -> out, and with an activation out2, out3.
std::vector<Tensor> gmm_op(int64_t product, int64_t act, const Tensor& a, const Tensor& b,
                           const MaybeTensor& up, const MaybeTensor& bias, const MaybeTensor& z,
                           const MaybeTensor& u, const Tensor& offs) {
  Device device(a);
  int64_t R = a.size(0), E = offs.size(0), d = b.size(-1);
  int64_t f = product == kForward ? b.size(1) : a.size(1);
  TORCH_CHECK(f % 8 == 0 && d % 8 == 0, "widths must be multiples of 8");
  std::vector<int64_t> w = {E, f, d}, in = {R, product == kForward ? d : f}, shape = {R, d};
  if (product == kForward) shape = {R, f};
  if (product == kWeightGrad) shape = w;
  std::vector<Tensor> outs;
  bf16* out[3] = {};
  for (int i = 0; i <= act; i++) {
    outs.push_back(at::empty(shape, a.options()));
    out[i] = bf16s(outs[i], shape);
  }
  Gmm g{(int)R, (int)E, (int)f, (int)d, ints(offs, {E}), bf16s(a, in),
        product == kWeightGrad ? bf16s(b, {R, d}) : bf16s(b, w), up ? bf16s(*up, w) : nullptr,
        bias ? bf16s(*bias, {E, f}) : nullptr, z ? bf16s(*z, shape) : nullptr,
        u ? bf16s(*u, shape) : nullptr, out[0], out[1], out[2], device.blocks, device.stream};
  if (R) gmm(g, (Product)product, (Activation)act);
  else if (product == kWeightGrad) outs[0].zero_();
  return outs;
}

TORCH_LIBRARY_IMPL(medmoe, BACKEND, m) {
  m.impl("route", route_op);
  m.impl("permute", permute_op);
  m.impl("unpermute", unpermute_op);
  m.impl("unpermute_grad", unpermute_grad_op);
  m.impl("gmm", gmm_op);
}

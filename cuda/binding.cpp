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
  cudaStream_t stream = nullptr;
  int blocks = cuda_on_cpu_blocks;
  explicit Device(const Tensor&) {}
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
template <class T>
T* data(const Tensor& x, at::ScalarType type, at::IntArrayRef sizes, int alignment = 16) {
  TORCH_CHECK(x.scalar_type() == type && x.sizes() == sizes, "expected ", type, sizes, ", got ",
              x.scalar_type(), x.sizes());
  TORCH_CHECK(x.is_contiguous() && (uintptr_t)x.data_ptr() % alignment == 0, "not aligned");
  return (T*)x.data_ptr();
}
bf16* bf16s(const Tensor& x, at::IntArrayRef s) { return data<bf16>(x, at::kBFloat16, s); }
int* ints(const Tensor& x, at::IntArrayRef s) { return data<int>(x, at::kInt, s, 4); }
float* floats(const Tensor& x, at::IntArrayRef s) { return data<float>(x, at::kFloat, s, 4); }

std::tuple<Tensor, Tensor> route_op(const Tensor& gates) {
  Device device(gates);
  int64_t n = gates.size(0), E = gates.size(1);
  TORCH_CHECK(E <= 48 && n * E < 1ll << 31, "at most 48 experts and 2^31 gates");
  auto slot = at::empty({n, E}, gates.options().dtype(at::kInt));
  auto offs = at::empty({E}, slot.options());
  route(floats(gates, {n, E}), n, E, ints(slot, {n, E}), ints(offs, {E}), device.stream);
  return {slot, offs};
}

// What the ops on rows share. Of in and out one is (n, d), the other (R, d).
Rows shared(const Tensor& in, const Tensor& slot, const MaybeTensor& gates, const Tensor& out,
            const Device& device) {
  int n = slot.size(0), E = slot.size(1), d = in.size(1);
  bool is_bf16 = in.scalar_type() == at::kBFloat16;
  TORCH_CHECK(is_bf16 || in.scalar_type() == at::kFloat, "expected bf16 or fp32");
  TORCH_CHECK(d * in.element_size() % 16 == 0, "rows must be multiples of 16 bytes");
  return {n, E, d, is_bf16, ints(slot, {n, E}), gates ? floats(*gates, {n, E}) : nullptr,
          data<void>(in, in.scalar_type(), in.sizes()), nullptr, out.data_ptr(), nullptr,
          device.stream};
}
Tensor permute_op(const Tensor& x, const Tensor& slot, int64_t n_routed) {
  Device device(x);
  TORCH_CHECK(x.size(0) == slot.size(0), "x and slot differ in rows");
  auto out = at::empty({n_routed, x.size(1)}, x.options());
  if (x.numel()) permute(shared(x, slot, {}, out, device));
  return out;
}
Tensor unpermute_op(const Tensor& y, const Tensor& slot, const MaybeTensor& gates) {
  Device device(y);
  auto out = at::empty({slot.size(0), y.size(1)}, y.options());
  if (out.numel()) unpermute(shared(y, slot, gates, out, device));
  return out;
}
std::tuple<Tensor, Tensor> unpermute_grad_op(const Tensor& grad, const Tensor& y,
                                             const Tensor& slot, const Tensor& gates) {
  Device device(y);
  auto dy = at::empty(y.sizes(), y.options()), dgates = at::empty(gates.sizes(), gates.options());
  Rows rows = shared(grad, slot, gates, dy, device);
  rows.y = data<void>(y, grad.scalar_type(), {y.size(0), rows.d});
  rows.dgates = floats(dgates, {rows.n, rows.E});
  if (grad.numel()) unpermute_grad(rows);
  return {dy, dgates};
}

// One of the three products of launchers.h -> its out[0], and with an activation out[1], out[2].
std::vector<Tensor> gmm_op(int64_t product, int64_t act, const Tensor& a, const Tensor& b,
                           const MaybeTensor& up, const MaybeTensor& bias, const MaybeTensor& z,
                           const MaybeTensor& u, const Tensor& offs) {
  Device device(a);
  int64_t R = a.size(0), E = offs.size(0), d = b.size(-1);
  int64_t f = product == kForward ? b.size(1) : a.size(1);
  TORCH_CHECK(f % 8 == 0 && d % 8 == 0, "widths must be multiples of 8");
  std::vector<int64_t> w = {E, f, d}, wide = {R, f}, narrow = {R, d};
  auto shape = product == kForward ? wide : product == kInputGrad ? narrow : w;
  Gmm g{(int)E, (int)f, (int)d, (int)R, ints(offs, {E})};
  g.a = bf16s(a, product == kForward ? narrow : wide);
  g.b = bf16s(b, product == kWeightGrad ? narrow : w);
  g.up = up ? bf16s(*up, w) : nullptr, g.bias = bias ? bf16s(*bias, {E, f}) : nullptr;
  g.z = z ? bf16s(*z, shape) : nullptr, g.u = u ? bf16s(*u, shape) : nullptr;
  g.blocks = device.blocks, g.stream = device.stream;
  std::vector<Tensor> out;
  for (int i = 0; i <= act; i++) {
    out.push_back(at::empty(shape, a.options()));
    g.out[i] = bf16s(out[i], shape);
  }
  if (R) gmm(g, (Product)product, (Activation)act);
  else if (product == kWeightGrad) out[0].zero_();
  return out;
}

TORCH_LIBRARY_IMPL(medmoe, BACKEND, m) {
  m.impl("route", route_op);
  m.impl("permute", permute_op);
  m.impl("unpermute", unpermute_op);
  m.impl("unpermute_grad", unpermute_grad_op);
  m.impl("gmm", gmm_op);
}

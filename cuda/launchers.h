// What the kernels offer to binding.cpp: plain functions that start them on a stream.
// n rows, E experts, d, f widths; R routed rows, a row once for each expert with a gate not zero,
// sorted by expert, then by row: expert e owns rows offs[e - 1] to offs[e] of R.
#pragma once
#ifdef CUDA_ON_CPU                       // tests/cuda_on_cpu.h runs the kernels without a GPU
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif
using bf16 = struct __nv_bfloat16;

// permute.cu. Rows of d float or bf16, in multiples of 16 bytes: what a thread moves at a time.
struct Rows {
  int n, E, d;
  bool is_bf16;
  const int* slot;                       // (n, E), the place in R of a row for an expert, or -1
  const float* gates;                    // (n, E), or null: they are 1
  const void *in, *y;
  void* out;
  float* dgates;                         // (n, E)
  cudaStream_t stream;
};
void route(const float* gates, int n, int E, int* slot, int* offs, cudaStream_t);
void permute(const Rows&);               // in (n, d) -> out (R, d)
void unpermute(const Rows&);             // in (R, d) -> out (n, d)
void unpermute_grad(const Rows&);        // in (n, d), y (R, d) -> out (R, d), dgates

// gmm.cu. a (R, d), b (E, f, d) -> (R, f): act(a_r b[e]' + bias[e]); the gradient of its input,
// a (R, f), b (E, f, d) -> (R, d): a_r b[e]; and of its weight, a (R, f), b (R, d) -> (E, f, d):
// a_e' b_e, summed over e's rows. The activation is done while the sums are in registers.
enum Product { kForward, kInputGrad, kWeightGrad };
enum Activation { kNone, kGelu, kSilu };
struct Gmm {
  int E, f, d, rows;
  const int* offs;
  const bf16 *a, *b, *up;                // up: the second matrix of a gated FFN, like b
  const bf16 *bias, *z, *u;              // (E, f) or null; what the activation read in forward
  bf16* out[3];                          // activate() says what goes where; null: nowhere
  int blocks;                            // one for each multiprocessor
  cudaStream_t stream;
};
void gmm(const Gmm&, Product, Activation);         // on Hopper
void gmm_sm80(const Gmm&, Product, Activation);    // ladder/pipelined.cu: from 8.0 on

// The product that every rung computes: c (m, n) = a (m, k) b (n, k)', bf16, with sums in fp32. It
// is a linear layer: m tokens, b its weight. n and k are multiples of 8, so rows are multiples of
// 16 bytes. Rungs 1 to 3 are plain functions, called through ctypes: a launch that fails ends the
// process. Rungs 4 and 5 are the grouped matmuls themselves, with one expert.
#pragma once
#include "../common.cuh"
#define RUNG(name)                                                                       \
  extern "C" __attribute__((visibility("default"))) void name(                           \
      const bf16* a, const bf16* b, bf16* c, int m, int n, int k, cudaStream_t stream)

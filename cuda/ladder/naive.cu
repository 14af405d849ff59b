// Rung 1, the definition: a thread for each output reads a row of a and a row of b.
//
// Why it is slow: 4 bytes are asked for with every multiplication and addition. The 32 threads of a
// warp have one row of a in common, but 32 rows of b, 2 k bytes apart: with every load the memory
// brings 32 pieces of 32 bytes, of which 2 are used; the rest helps only if it stays in the cache
// until the next 15 loads.
#include "ladder.h"
namespace {
__global__ void naive_kernel(const bf16* a, const bf16* b, bf16* c, int m, int n, int k) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, col = blockIdx.y * 32 + threadIdx.x % 32;
  if (row >= m || col >= n) return;
  float sum = 0;
  for (int i = 0; i < k; i++)
    sum += to_float(a[(int64_t)row * k + i]) * to_float(b[(int64_t)col * k + i]);
  c[(int64_t)row * n + col] = from_float<bf16>(sum);
}
}  // namespace

RUNG(naive) {
  launch(naive_kernel, dim3((m + 7) / 8, (n + 31) / 32), 256, 0, stream, a, b, c, m, n, k);
}

// Rung 2, tiles in shared memory: a block computes 64 x 64 outputs, a thread 4 x 4 of them.
//
// What it adds: a number read from memory is used 64 times, not once, and one read from shared
// memory 4 times. A slice of both operands, 32 deep, is 8 KB of memory for 64 * 64 * 32
// multiplications: 16 for a byte, where rung 1 had a quarter. Neighbouring threads load
// neighbouring numbers, so all 32 bytes of a piece are used.
//
// Why it is still slow: it multiplies one number at a time, in fp32 (67 TFLOP/s on an H100, where
// its tensor cores have 989), and everything stands still while a slice is loaded.
#include "ladder.h"
namespace {
constexpr int kTile = 64, kDeep = 32, kThreads = 256;

// A slice with k first: so the threads that compute read neighbours. One number of padding a row,
// or the 32 threads that store a row's 32 k would all write to the same bank.
using Slice = float[kDeep][kTile + 1];

// Rows from `first` on, columns from k0 on; what lies past the matrix becomes 0.
__device__ void load(Slice& slice, const bf16* from, int first, int k0, int rows, int k) {
  for (int i = threadIdx.x; i < kTile * kDeep; i += kThreads) {
    int row = first + i / kDeep, column = k0 + i % kDeep;
    bool inside = row < rows && column < k;
    slice[i % kDeep][i / kDeep] = inside ? to_float(from[(int64_t)row * k + column]) : 0;
  }
}

__global__ void tiles_kernel(const bf16* a, const bf16* b, bf16* c, int m, int n, int k) {
  __shared__ Slice slice_a, slice_b;
  int row = blockIdx.x * kTile, y = threadIdx.x / 16;
  int col = blockIdx.y * kTile, x = threadIdx.x % 16;
  float sum[4][4] = {};                                 // of rows y + 16 i, columns x + 16 j
  for (int k0 = 0; k0 < k; k0 += kDeep) {
    load(slice_a, a, row, k0, m, k);
    load(slice_b, b, col, k0, n, k);
    __syncthreads();                                    // all is there
    for (int i = 0; i < kDeep; i++) {
      float of_a[4], of_b[4];                           // 8 loads for 16 multiplications
      for (int j = 0; j < 4; j++) of_a[j] = slice_a[i][y + 16 * j];
      for (int j = 0; j < 4; j++) of_b[j] = slice_b[i][x + 16 * j];
      for (int j = 0; j < 16; j++) sum[j / 4][j % 4] += of_a[j / 4] * of_b[j % 4];
    }
    __syncthreads();                                    // all is used
  }
  for (int j = 0; j < 16; j++) {
    int r = row + y + j / 4 * 16, at = col + x + j % 4 * 16;
    if (r < m && at < n) c[(int64_t)r * n + at] = from_float<bf16>(sum[j / 4][j % 4]);
  }
}
}  // namespace

RUNG(tiles) {
  dim3 grid((m + kTile - 1) / kTile, (n + kTile - 1) / kTile);
  launch(tiles_kernel, grid, kThreads, 0, stream, a, b, c, m, n, k);
}

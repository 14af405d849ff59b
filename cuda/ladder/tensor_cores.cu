// Rung 3, tensor cores: a warp multiplies 16 x 16 by 16 x 8 in one instruction (mma.sync), 2 048
// multiplications where a warp of rung 2 does 32. A block of four warps computes 128 x 128 outputs.
//
// What it adds: on an H100, mma.sync reaches about 63 % of what its tensor cores can do (wgmma, of
// rung 5, the rest), on an A100 all of it. Slices stay bf16, are moved 16 bytes at a time, and lie
// in the order of the swizzle (README.md), so that ldmatrix reads them without bank conflicts. A
// warp's 64 x 64 outputs: 4 + 4 fragments are read for 4 * 8 instructions.
//
// Why it is still slow: a block loads, waits about 700 cycles for the memory, then multiplies for
// 512 (on an A100). In rung 4 the next two slices are on their way while it multiplies.
#include "ladder.h"
namespace {
constexpr int kTile = 128, kDeep = 32, kThreads = 128;
struct Slice { bf16 a[kTile * kDeep], b[kTile * kDeep]; };

// Where (row, k) of an operand lies in its slice: the piece of 16 bytes, of the 8 in 128 bytes, is
// mixed with the number of these 128 bytes. k begins a piece.
__device__ int place(int row, int k) {
  int i = row * kDeep + k;
  return i ^ i / 64 % 8 * 8;
}

// Rows from `first` on, columns from k0 on; what lies past the matrix becomes 0.
__device__ void load(bf16* slice, const bf16* from, int first, int k0, int rows, int k) {
  for (int i = threadIdx.x; i < kTile * kDeep / 8; i += kThreads) {
    int row = first + i / 4, column = k0 + i % 4 * 8;
    Vec<bf16> v{};
    if (row < rows && column < k) v = *(const Vec<bf16>*)(from + (int64_t)row * k + column);
    *(Vec<bf16>*)(slice + place(i / 4, i % 4 * 8)) = v;
  }
}

// 16 rows and 16 k: rows 0 to 7, 8 to 15, and both again for the next 8 k. A lane names one of the
// 32 pieces that are read; what it gets is drawn in README.md.
__device__ void fragment(uint32_t (&r)[4], const bf16* slice, int row, int k) {
  int lane = threadIdx.x % 32;
  ldmatrix<false>(r, slice + place(row + lane % 16, k + lane / 16 * 8));
}

__global__ void __launch_bounds__(kThreads, 2)
tensor_cores_kernel(const bf16* a, const bf16* b, bf16* c, int m, int n, int k) {
  Slice& slice = *dynamic_smem<Slice>();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row = warp / 2 * 64, col = warp % 2 * 64;         // of the warp's outputs, in the tile
  float sum[4][8][4] = {};
  for (int k0 = 0; k0 < k; k0 += kDeep) {
    load(slice.a, a, blockIdx.x * kTile, k0, m, k);
    load(slice.b, b, blockIdx.y * kTile, k0, n, k);
    __syncthreads();                                    // all is there
#pragma unroll
    for (int j = 0; j < kDeep; j += 16) {
      uint32_t of_a[4][4], of_b[4][4];
      for (int i = 0; i < 4; i++) fragment(of_a[i], slice.a, row + i * 16, j);
      for (int i = 0; i < 4; i++) fragment(of_b[i], slice.b, col + i * 16, j);
      for (int i = 0; i < 32; i++) {
        auto& pair = of_b[i % 8 / 2];                   // of 8 columns, then of 8 more
        mma_m16n8k16(sum[i / 8][i % 8], of_a[i / 8], pair[i % 2], pair[i % 2 + 2]);
      }
    }
    __syncthreads();                                    // all is used
  }
  row += blockIdx.x * kTile + lane / 4, col += blockIdx.y * kTile + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4 * 8 * 2; i++) {                 // a pair of neighbouring sums at a time
    int r = row + i / 16 * 16 + i % 2 * 8, at = col + i / 2 % 8 * 8;
    auto& s = sum[i / 16][i / 2 % 8];
    if (r < m && at < n)
      *(__nv_bfloat162*)(c + (int64_t)r * n + at) = __floats2bfloat162_rn(s[i % 2 * 2],
                                                                          s[i % 2 * 2 + 1]);
  }
}
}  // namespace

RUNG(tensor_cores) {
  dim3 grid((m + kTile - 1) / kTile, (n + kTile - 1) / kTile);
  launch(tensor_cores_kernel, grid, kThreads, sizeof(Slice), stream, a, b, c, m, n, k);
}

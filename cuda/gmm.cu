// Grouped matmul on Hopper: each expert's rows times that expert's matrix. Without padding, and
// the host need not know the offsets. See launchers.h for the three products.
//
// A block computes tiles of 128 x 256 outputs, one after another. It has three warpgroups: one asks
// the copy engine for slices of both operands, 64 deep, up to 4 ahead; the other two multiply them,
// 64 rows of the tile each. Slices go round through 4 places in shared memory, and each place
// has two mbarriers: `full` ends a phase when the slice has come, `empty` when all have used it.
#include "tiles.cuh"
constexpr int kCols = 256, kDeep = 64, kPlaces = 4, kThreads = 384;
struct Slice { bf16 a[kRows * kDeep], b[kCols * kDeep]; };     // 16 KB + 32 KB
struct Smem { Slice slice[kPlaces]; uint64_t full[kPlaces], empty[kPlaces]; };

// ---- operands ----------------------------------------------------------------------------------
// In a place, an operand lies in panels 64 wide, 128 bytes a row. Forward reads both with k along
// the rows: a panel's row is a row of the matrix. In the gradients an operand can be transposed: a
// row of a panel is one k, with 64 rows (or columns) of the result along it; more panels follow.
// What wgmma must know of an operand, "matrix descriptor" in PTX ISA: where it starts; in units of
// 16 bytes, the steps between panels (if transposed) and between 8 rows (1024 bytes); the swizzle.
__device__ inline uint64_t descriptor(const bf16* panel, bool transposed) {
  uint64_t start = smem_addr(panel) >> 4, rows = 1024 >> 4, panels = transposed ? kDeep * 8 : 1;
  return start | panels << 16 | rows << 32 | 1ull << 62;       // 1 << 62: 128-byte swizzle
}

template <Product op, Activation act>
__device__ void load(Slice& s, uint64_t* full, const TensorMap& a, const TensorMap& b,
                     const TensorMap& up, const Tile& t, int k) {
  mbarrier_expect_bytes(full, sizeof(Slice));
  if (!kTransA<op>) tma_load(s.a, a, full, k, t.row, 0);
  for (int p = 0; kTransA<op> && p < kRows / 64; p++)
    tma_load(s.a + p * 64 * kDeep, a, full, t.row + p * 64, k, 0);
  if (!kTransB<op>) tma_load(s.b, b, full, k, t.col, t.expert);
  for (int p = 0; kTransB<op> && p < kCols / 64; p++)
    tma_load(s.b + p * 64 * kDeep, b, full, t.col + p * 64, k, op == kInputGrad ? t.expert : 0);
  if (kGated<op, act>) tma_load(s.b + 128 * kDeep, up, full, k, t.col, t.expert);
}

// The last slice of a weight gradient reaches into the next expert's rows. They must count as 0, in
// both operands, as 0 times their infinity would not be.
__device__ inline void clear_from(Slice& s, int k, int tid) {
  for (int row = k + tid / 32; row < kDeep; row += 8)          // 8 warps, a row of 128 bytes each
    for (int p = 0; p < (kRows + kCols) / 64; p++)
      ((uint32_t*)&s)[(p * kDeep + row) * 32 + tid % 32] = 0;
  fence_async_proxy();
  named_barrier(1, 256);
}

template <Product op, Activation act>
__global__ void __launch_bounds__(kThreads, 1)
gmm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
           const __grid_constant__ TensorMap up, const __grid_constant__ Gmm g) {
  Smem& s = *dynamic_smem<Smem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPlaces; i++) {
      mbarrier_init(&s.full[i], 1);                     // the loading thread, and the bytes
      mbarrier_init(&s.empty[i], 8);                    // 8 warps multiply
    }
    fence_barrier_init();
  }
  __syncthreads();
  constexpr int kWidth = kGated<op, act> ? kCols / 2 : kCols;     // columns of a tile's results
  Tile t;
  int n = 0;                                            // slices so far, of all tiles of this block

  if (threadIdx.x < 128) {
    give_regs<40>();
    for (int i = blockIdx.x; threadIdx.x == 0 && find_tile<op>(g, kWidth, i, t); i += gridDim.x)
      for (int k = t.k_begin; k < t.k_end; k += kDeep, n++) {
        int place = n % kPlaces, round = n / kPlaces;
        mbarrier_wait(&s.empty[place], round % 2 ^ 1);  // at first this does not wait: all is empty
        load<op, act>(s.slice[place], &s.full[place], a, b, up, t, k);
      }
    return;
  }
  take_regs<232>();
  int tid = threadIdx.x - 128, half = tid / 128;
  for (int i = blockIdx.x; find_tile<op>(g, kWidth, i, t); i += gridDim.x) {
    float sum[32][4];
    Part part = part_of<op>(g, t, t.row + tid / 32 * 16, t.col);
    start_sums<op>(g, t.expert, part, sum);             // a weight gradient of no rows stays 0
    for (int k = t.k_begin; k < t.k_end; k += kDeep, n++) {
      int place = n % kPlaces, round = n / kPlaces;
      Slice& slice = s.slice[place];
      mbarrier_wait(&s.full[place], round % 2);
      if (op == kWeightGrad && k + kDeep > t.k_end) clear_from(slice, t.k_end - k, tid);
      uint64_t da = descriptor(slice.a + half * 64 * kDeep, kTransA<op>);
      uint64_t db = descriptor(slice.b, kTransB<op>);
      wgmma_fence();
      for (int j = 0; j < kDeep / 16; j++)              // 16 k on: 32 bytes, or 16 rows of 128
        wgmma_m64n256k16<kTransA<op>, kTransB<op>>(sum, da + j * (kTransA<op> ? 128 : 2),
                                          db + j * (kTransB<op> ? 128 : 2));
      wgmma_commit();
      wgmma_wait();
      if (tid % 32 == 0) mbarrier_arrive(&s.empty[place]);
    }
    store_sums<op, act>(g, part, sum);
  }
}

void gmm(const Gmm& g, Product op, Activation act) {
  static void (*const kernels[])(TensorMap, TensorMap, TensorMap, Gmm) = {
      gmm_kernel<kForward, kNone>, gmm_kernel<kForward, kGelu>, gmm_kernel<kForward, kSilu>,
      gmm_kernel<kInputGrad, kNone>, gmm_kernel<kInputGrad, kGelu>, gmm_kernel<kInputGrad, kSilu>,
      gmm_kernel<kWeightGrad, kNone>};
  int box = op != kForward ? kDeep : act == kSilu ? 128 : kCols;
  int width = op == kForward ? g.d : g.f;
  auto a = tensor_map(g.a, 1, g.rows, width, op == kWeightGrad ? kDeep : kRows);
  auto b = op == kWeightGrad ? tensor_map(g.b, 1, g.rows, g.d, box)
                             : tensor_map(g.b, g.E, g.f, g.d, box);
  auto up = g.up ? tensor_map(g.up, g.E, g.f, g.d, box) : b;
  launch(kernels[op * 3 + act], g.blocks, kThreads, sizeof(Smem), g.stream, a, b, up, g);
}

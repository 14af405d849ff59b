// Grouped matmul on Hopper: each expert's rows times that expert's matrix. Without padding, and
// the host need not know the offsets. See launchers.h for the three products.
//
// A block computes tiles of 128 x 256 outputs, one after another. It has three warpgroups: one asks
// the copy engine for slices of both operands, 64 deep, up to 4 ahead; the other two multiply them,
// 64 rows of the tile each. Slices go round through 4 places in shared memory, and each place
// has two mbarriers: `full` ends a phase when the slice has come, `empty` when all have used it.
#include "common.cuh"
constexpr int kRows = 128, kCols = 256, kDeep = 64, kPlaces = 4, kThreads = 384;
struct Slice { bf16 a[kRows * kDeep], b[kCols * kDeep]; };     // 16 KB + 32 KB
struct Smem { Slice slice[kPlaces]; uint64_t full[kPlaces], empty[kPlaces]; };

// ---- which tile --------------------------------------------------------------------------------
// The first row and column of its outputs, the row at which its outputs end, and what it sums over:
// columns of the operands, or (weight gradient) the rows of the expert.
struct Tile { int expert, row, col, row_end, k_begin, k_end; };

// The columns that a tile's 256 sums make: a gated tile has 128 of `gate` and the same 128 of `up`.
template <Product op, Activation act>
constexpr int kWidth = op == kForward && act == kSilu ? 128 : kCols;

// The i-th tile, experts one after another; false after the last. 16 rows of tiles at a time, so
// that what the blocks read at the same moment stays in the L2 cache.
template <Product op, Activation act> __device__ bool find_tile(const Gmm& g, int i, Tile& tile) {
  int width = kWidth<op, act>, across = ((op == kForward ? g.f : g.d) + width - 1) / width;
  int begin = 0;
  for (int e = 0; e < g.E; e++) {
    int end = g.offs[e], rows = op == kWeightGrad ? g.f : end - begin;
    int down = (rows + kRows - 1) / kRows;
    if (i < down * across) {
      int top = i / (16 * across) * 16, height = min(16, down - top), rest = i - top * across;
      int row = (top + rest % height) * kRows, col = rest / height * width;
      if (op == kWeightGrad) tile = {e, row, col, g.f, begin, end};
      else tile = {e, begin + row, col, end, 0, op == kForward ? g.d : g.f};
      return true;
    }
    i -= down * across;
    begin = end;
  }
  return false;
}

// ---- operands ----------------------------------------------------------------------------------
// In a place, an operand lies in panels 64 wide, 128 bytes a row. Forward reads both with k along
// the rows: a panel's row is a row of the matrix. In the gradients an operand can be transposed: a
// row of a panel is one k, with 64 rows (or columns) of the result along it; more panels follow.
template <Product op> constexpr bool kTransA = op == kWeightGrad;
template <Product op> constexpr bool kTransB = op != kForward;

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
  if (act == kSilu && op == kForward) tma_load(s.b + 128 * kDeep, up, full, k, t.col, t.expert);
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

// ---- what becomes of the sums ------------------------------------------------------------------
// Value and slope of GELU, tanh-approximated as Phi-2's: z s with s = sigmoid(2 sqrt(2 / pi) (z +
// 0.044715 z^3)), as (1 + tanh x) / 2 = sigmoid(2 x); and of SiLU: z sigmoid(z). By approximate
// instructions: a division, correctly rounded, would be a call of 30 instructions.
__device__ inline float sigmoid_log2(float x) { return rcp_approx(1 + exp2_approx(-x)); }
constexpr float kLog2e = 1.44269504f;                   // sigmoid_log2(x log2(e)) = sigmoid(x)
__device__ inline float2 gelu(float z) {
  float z2 = z * z, s = sigmoid_log2(z * (1.59576912f * kLog2e + 0.07135482f * kLog2e * z2));
  float h = z * s;
  return {h, s + (h - h * s) * (1.59576912f + 0.21406445f * z2)};
}
__device__ inline float2 silu(float z) {
  float s = sigmoid_log2(z * kLog2e), h = z * s;
  return {h, s + (h - h * s)};
}

// Two neighbours in a row of bf16, as they are loaded and stored: 4 bytes.
using Pair = __nv_bfloat162;
__device__ inline Pair load_pair(const bf16* p, bool inside) {
  return inside ? *(const Pair*)p : Pair{};
}

// What is stored of two sums y (and gated, u of up). As z and u are rounded before they are used,
// backward sees the same numbers. There y is the gradient of the activation's result h; h is made
// again for the weight gradient that needs it, not kept.
struct Outputs { Pair pair[3]; };
template <Product op, Activation act>
__device__ Outputs activate(float2 y, float2 y_up, Pair z, Pair u) {
  Pair plain = __floats2bfloat162_rn(y.x, y.y);
  if (act == kNone) return {plain};
  if (op == kForward) z = plain, u = __floats2bfloat162_rn(y_up.x, y_up.y);
  float2 f = __bfloat1622float2(z), up = __bfloat1622float2(u);
  float2 a = act == kGelu ? gelu(f.x) : silu(f.x), b = act == kGelu ? gelu(f.y) : silu(f.y);
  if (act == kGelu) up = {1, 1};
  Pair h = __floats2bfloat162_rn(a.x * up.x, b.x * up.y);
  if (op == kForward) return {h, z, u};                 // out[0], out[1], out[2]
  Pair dz = __floats2bfloat162_rn(y.x * up.x * a.y, y.y * up.y * b.y);
  if (act == kGelu) return {dz, h};
  return {dz, __floats2bfloat162_rn(y.x * a.x, y.y * b.x), h};
}

// A thread's part of a tile: two rows, 8 apart, and of every 8 columns two. Pair i has its sums of
// row i % 2 and of the columns col + i / 2 * 8 and the next; it is stored at at(i) of a result.
struct Part {
  int col, cols, left[2];                               // columns from col to the end of a row
  int64_t start;
  __device__ bool inside(int i) const { return i / 2 * 8 < left[i % 2]; }
  __device__ int64_t at(int i) const { return start + (int64_t)(i % 2 * 8) * cols + i / 2 * 8; }
};
template <Product op> __device__ Part part_of(const Gmm& g, const Tile& t, int half) {
  int tid = threadIdx.x % 128, cols = op == kForward ? g.f : g.d;
  int row = t.row + half * 64 + tid / 32 * 16 + tid % 32 / 4, col = t.col + tid % 4 * 2;
  int64_t expert = op == kWeightGrad ? (int64_t)t.expert * g.f * g.d : 0;
  return {col, cols, {row < t.row_end ? cols - col : 0, row + 8 < t.row_end ? cols - col : 0},
          expert + (int64_t)row * cols + col};
}

// In batches: all loads of a batch come before its first store, so that they are on their way at
// the same time, and what a batch computes needs no more registers than there are.
template <Product op, Activation act>
__device__ void store_tile(const Gmm& g, const Tile& t, const float (&sum)[32][4], int half) {
  constexpr int kBatch = 16;                            // pairs, of 64 columns
  constexpr bool kReads = op == kInputGrad && act != kNone;
  Part p = part_of<op>(g, t, half);
  bool kept = op != kForward || g.out[act];             // false: there will be no backward
#pragma unroll
  for (int first = 0; first < kWidth<op, act> / 4; first += kBatch) {
    if (t.col + first * 4 >= p.cols) break;
    Pair z[kBatch], u[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      bool inside = kReads && p.inside(first + i);
      z[i] = load_pair(g.z + p.at(first + i), inside);
      u[i] = load_pair(g.u + p.at(first + i), inside && act == kSilu);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      int j = (first + i) / 2, low = i % 2 * 2, up = act == kSilu ? j % 16 + 16 : j;
      auto out = activate<op, act>({sum[j][low], sum[j][low + 1]},
                                   {sum[up][low], sum[up][low + 1]}, z[i], u[i]);
      for (int k = 0; k <= act; k++)
        if (p.inside(first + i) && (k == 0 || kept))
          *(Pair*)(g.out[k] + p.at(first + i)) = out.pair[k];
    }
  }
}

// A tile's sums begin at the bias, which so costs no time after the last product.
template <Product op>
__device__ void start_sums(const Gmm& g, const Tile& t, float (&sum)[32][4], int half) {
  Part p = part_of<op>(g, t, half);
#pragma unroll
  for (int j = 0; j < 32; j++) {
    int col = min(p.col + j * 8, p.cols - 2);           // sums past the matrix are not stored
    const bf16* bias = g.bias + t.expert * g.f + col;
    float2 b = __bfloat1622float2(load_pair(bias, op == kForward && g.bias));
    sum[j][0] = sum[j][2] = b.x, sum[j][1] = sum[j][3] = b.y;
  }
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
  Tile t;
  int n = 0;                                            // slices so far, of all tiles of this block

  if (threadIdx.x < 128) {
    give_regs<40>();
    for (int i = blockIdx.x; threadIdx.x == 0 && find_tile<op, act>(g, i, t); i += gridDim.x)
      for (int k = t.k_begin; k < t.k_end; k += kDeep, n++) {
        int place = n % kPlaces, round = n / kPlaces;
        mbarrier_wait(&s.empty[place], round % 2 ^ 1);  // at first this does not wait: all is empty
        load<op, act>(s.slice[place], &s.full[place], a, b, up, t, k);
      }
    return;
  }
  take_regs<232>();
  int tid = threadIdx.x - 128, half = tid / 128;
  for (int i = blockIdx.x; find_tile<op, act>(g, i, t); i += gridDim.x) {
    float sum[32][4];
    start_sums<op>(g, t, sum, half);                    // a weight gradient of no rows stays 0
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
    store_tile<op, act>(g, t, sum, half);
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

// What both grouped matmuls share: which tile is next, and what becomes of its sums.
#pragma once
#include "common.cuh"
constexpr int kRows = 128;                              // of a tile

// ---- which tile --------------------------------------------------------------------------------
// The first row and column of its outputs, the row at which its outputs end, and what it sums over:
// columns of the operands, or (weight gradient) the rows of the expert.
struct Tile { int expert, row, col, row_end, k_begin, k_end; };

// A tile of the gated forward has half of its sums from `gate` and half, the same columns, of `up`.
template <Product op, Activation act> constexpr bool kGated = op == kForward && act == kSilu;

// The i-th tile, experts one after another; false after the last. 16 rows of tiles at a time, so
// that what the blocks read at the same moment stays in the L2 cache.
template <Product op> __device__ bool find_tile(const Gmm& g, int width, int i, Tile& tile) {
  int across = ((op == kForward ? g.f : g.d) + width - 1) / width, begin = 0;
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

// Forward sums along the rows of both operands. In a gradient one can be transposed: its rows are
// what is summed over.
template <Product op> constexpr bool kTransA = op == kWeightGrad;
template <Product op> constexpr bool kTransB = op != kForward;

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

// A thread's part of its warp's 16 rows of a tile, from (row, col) on: two rows, 8 apart, and of
// every 8 columns two. Pair i has its sums of row i % 2 and of the columns col + i / 2 * 8 and the
// next; it is stored at at(i) of a result.
struct Part {
  int col, cols, left[2];                               // columns from col to the end of a row
  int64_t start;
  __device__ bool inside(int i) const { return i / 2 * 8 < left[i % 2]; }
  __device__ int64_t at(int i) const { return start + (int64_t)(i % 2 * 8) * cols + i / 2 * 8; }
};
template <Product op> __device__ Part part_of(const Gmm& g, const Tile& t, int row, int col) {
  int lane = threadIdx.x % 32, cols = op == kForward ? g.f : g.d;
  row += lane / 4, col += lane % 4 * 2;
  int64_t expert = op == kWeightGrad ? (int64_t)t.expert * g.f * g.d : 0;
  return {col, cols, {row < t.row_end ? cols - col : 0, row + 8 < t.row_end ? cols - col : 0},
          expert + (int64_t)row * cols + col};
}

// In batches: all loads of a batch come before its first store, so that they are on their way at
// the same time, and what a batch computes needs no more registers than there are.
template <Product op, Activation act, int N>
__device__ void store_sums(const Gmm& g, const Part& p, const float (&sum)[N][4]) {
  constexpr int kPairs = kGated<op, act> ? N : 2 * N, kBatch = N < 32 ? 8 : 16;
  constexpr bool kReads = op == kInputGrad && act != kNone;
  bool kept = op != kForward || g.out[act];             // false: there will be no backward
#pragma unroll
  for (int first = 0; first < kPairs; first += kBatch) {
    if (p.col + first * 4 >= p.cols) break;
    Pair z[kBatch], u[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      bool inside = kReads && p.inside(first + i);
      z[i] = load_pair(g.z + p.at(first + i), inside);
      u[i] = load_pair(g.u + p.at(first + i), inside && act == kSilu);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      int j = (first + i) / 2, low = i % 2 * 2, up = kGated<op, act> ? j + N / 2 : j;
      auto out = activate<op, act>({sum[j][low], sum[j][low + 1]},
                                   {sum[up][low], sum[up][low + 1]}, z[i], u[i]);
      for (int k = 0; k <= act; k++)
        if (p.inside(first + i) && (k == 0 || kept))
          *(Pair*)(g.out[k] + p.at(first + i)) = out.pair[k];
    }
  }
}

// A tile's sums begin at the bias, which so costs no time after the last product.
template <Product op, int N>
__device__ void start_sums(const Gmm& g, int expert, const Part& p, float (&sum)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++) {
    int col = min(p.col + j * 8, p.cols - 2);           // sums past the matrix are not stored
    const bf16* bias = g.bias + expert * g.f + col;
    float2 b = __bfloat1622float2(load_pair(bias, op == kForward && g.bias));
    sum[j][0] = sum[j][2] = b.x, sum[j][1] = sum[j][3] = b.y;
  }
}


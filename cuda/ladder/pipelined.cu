// Rung 4, and the grouped matmul of all GPUs from compute capability 8.0 on but Hopper: what gmm.cu
// does, with the instructions of Ampere. No thread only loads: all ask for a slice of both operands
// (cp.async), and while it is on its way they multiply what came before (mma.sync).
//
// A block computes tiles of 128 x 128 outputs, a warp 64 x 64 of them. Slices are 32 deep and go
// round through 3 places in shared memory, 48 KB: two blocks fit a multiprocessor, and while one
// stores its tile the other multiplies.
#include "../tiles.cuh"
namespace {                              // gmm.cu has the same names
constexpr int kCols = 128, kDeep = 32, kPlaces = 3, kThreads = 128;
struct Slice { bf16 a[kRows * kDeep], b[kCols * kDeep]; };

// Where row (or column) mn of an operand has its k in a slice, swizzled as by TMA: see README.md. A
// transposed operand has two panels, with a row of 64 numbers for each k.
template <bool trans> __device__ int place(int mn, int k) {
  int i = trans ? (mn / 64 * kDeep + k) * 64 + mn % 64 : mn * kDeep + k;
  return i ^ i / 64 % 8 * 8;
}

// The i-th of an operand's 512 pieces of 16 bytes in a slice; the next is the next in memory.
template <bool trans> __device__ int2 piece(int i) {
  return trans ? int2{i % 16 * 8, i / 16} : int2{i / 4, i % 4 * 8};
}

// What lies past the expert's rows, its matrix or k_end becomes 0. A gated tile's b has 32 columns
// of gate and the same 32 of up, then the next 32 of both: a warp gets its own of both.
template <Product op, Activation act>
__device__ void load(Slice& s, const Gmm& g, const Tile& t, int64_t k0) {
  constexpr bool ta = kTransA<op>, tb = kTransB<op>, gated = kGated<op, act>;
  int width = op == kForward ? g.d : g.f, cols = op == kForward ? g.f : g.d;   // of a, result
  int64_t a = ta ? k0 * width + t.row : (int64_t)t.row * width + k0;
  int64_t b = tb ? k0 * g.d + t.col : (int64_t)t.col * g.d + k0;
  if (op != kWeightGrad) b += (int64_t)t.expert * g.f * g.d;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    auto [m, ka] = piece<ta>(threadIdx.x + i * kThreads);
    bool inside = t.row + m < t.row_end && k0 + ka < t.k_end;
    cp_async(s.a + place<ta>(m, ka), g.a + a + (ta ? ka * width + m : m * width + ka), inside);
    auto [n, kb] = piece<tb>(threadIdx.x + i * kThreads);
    int col = gated ? n / 64 * 32 + n % 32 : n;
    inside = t.col + col < cols && k0 + kb < t.k_end;
    const bf16* from = gated && n % 64 >= 32 ? g.up : g.b;
    cp_async(s.b + place<tb>(n, kb), from + b + (tb ? kb * g.d + col : col * g.d + kb), inside);
  }
}

// 16 rows (or columns) and 16 k: mn + 0 to 7, mn + 8 to 15, and both again for the next 8 k.
template <bool trans>
__device__ void fragment(uint32_t (&r)[4], const bf16* operand, int mn, int k) {
  int lane = threadIdx.x % 32, row = lane % 8;
  mn += lane / 8 % 2 * 8, k += lane / 16 * 8;
  ldmatrix<trans>(r, operand + (trans ? place<true>(mn, k + row) : place<false>(mn + row, k)));
}

template <Product op, Activation act>
__global__ void __launch_bounds__(kThreads, 2) kernel(const __grid_constant__ Gmm g) {
  constexpr int kWidth = kGated<op, act> ? kCols / 2 : kCols;
  Slice* slice = dynamic_smem<Slice>();
  int warp = threadIdx.x / 32, row = warp / 2 * 64, col = warp % 2 * 64;
  Tile t;
  for (int i = blockIdx.x; find_tile<op>(g, kWidth, i, t); i += gridDim.x) {
    float sum[4][8][4];
    auto part = [&](int m) {
      return part_of<op>(g, t, t.row + row + m * 16, t.col + warp % 2 * kWidth / 2);
    };
#pragma unroll
    for (int m = 0; m < 4; m++) start_sums<op>(g, t.expert, part(m), sum[m]);
    int n = (t.k_end - t.k_begin + kDeep - 1) / kDeep;
    auto ask = [&](int s) {                             // past the last, an empty group
      if (s < n) load<op, act>(slice[s % kPlaces], g, t, t.k_begin + s * kDeep);
      cp_async_commit();
    };
    for (int s = 0; s < kPlaces - 1; s++) ask(s);
    for (int s = 0; s < n; s++) {
      cp_async_wait<kPlaces - 2>();                     // this thread's part of slice s has come
      __syncthreads();                                  // all of it, and slice s - 1 is used:
      ask(s + kPlaces - 1);                             // this takes its place
      const Slice& now = slice[s % kPlaces];
#pragma unroll
      for (int k = 0; k < kDeep; k += 16) {
        uint32_t a[4][4], b[4][4];
        for (int m = 0; m < 4; m++) fragment<kTransA<op>>(a[m], now.a, row + m * 16, k);
        for (int m = 0; m < 4; m++) fragment<kTransB<op>>(b[m], now.b, col + m * 16, k);
        for (int m = 0; m < 4; m++)
          for (int j = 0; j < 8; j++)
            mma_m16n8k16(sum[m][j], a[m], b[j / 2][j % 2], b[j / 2][j % 2 + 2]);
      }
    }
    __syncthreads();                                    // the last slices are used
#pragma unroll
    for (int m = 0; m < 4; m++) store_sums<op, act>(g, part(m), sum[m]);
  }
}
}  // namespace

void gmm_sm80(const Gmm& g, Product op, Activation act) {
  static void (*const kernels[])(Gmm) = {
      kernel<kForward, kNone>,   kernel<kForward, kGelu>,   kernel<kForward, kSilu>,
      kernel<kInputGrad, kNone>, kernel<kInputGrad, kGelu>, kernel<kInputGrad, kSilu>,
      kernel<kWeightGrad, kNone>};
  launch(kernels[op * 3 + act], 2 * g.blocks, kThreads, kPlaces * sizeof(Slice), g.stream, g);
}

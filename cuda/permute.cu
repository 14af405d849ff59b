// Rows to experts and back: route, permute, unpermute and the gradients.
// No sort, no atomics; the result does not depend on the order in which threads run.
#include "common.cuh"
constexpr int kWarps = 32, kMaxExperts = 48;

// ---- route: gates (n, E) -> slot (n, E), offs (E) ----------------------------------------------
// A stable counting sort in one block; the gates of 4 096 rows are 64 KB. A warp owns a stretch of
// rows. It counts those routed to each expert; sums over the warps before it, expert by expert,
// give the first slot of each expert; then it assigns the slots. A ballot has a bit for each lane.
__global__ void __launch_bounds__(kWarps * 32)
route_kernel(const float* gates, int n, int E, int* slot, int* offs) {
  __shared__ int count[kMaxExperts][kWarps];           // then: the warp's first slot of each
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stretch = (n + kWarps - 1) / kWarps;
  int begin = min(warp * stretch, n), end = min(begin + stretch, n);
  for (int e = 0; e < E; e++) {
    int routed = 0;
    for (int first = begin; first < end; first += 32) {
      int row = first + lane;
      routed += __popc(__ballot_sync(~0u, row < end && gates[(int64_t)row * E + e] != 0));
    }
    if (lane == 0) count[e][warp] = routed;
  }
  __syncthreads();
  for (int e = 0, before = 0; warp == 0 && e < E; e++) {
    int routed = count[e][lane], sum = routed;         // lane's is the sum of lanes 0 to lane
    for (int step = 1; step < 32; step *= 2) {
      int below = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += below;
    }
    count[e][lane] = before + sum - routed;
    before += __shfl_sync(~0u, sum, 31);
    if (lane == 0) offs[e] = before;
  }
  __syncthreads();
  for (int e = 0; e < E; e++) {
    int next = count[e][warp];
    for (int first = begin; first < end; first += 32) {
      int64_t row = first + lane, at = row * E + e;
      bool routed = row < end && gates[at] != 0;
      unsigned ballot = __ballot_sync(~0u, routed), below = ballot & ((1u << lane) - 1);
      if (row < end) slot[at] = routed ? next + __popc(below) : -1;
      next += __popc(ballot);
    }
  }
}

// ---- a warp for each row, 16 bytes for each lane at a time -------------------------------------
constexpr int kRows = 8;                               // of a block
__device__ inline int64_t my_row() { return (int64_t)blockIdx.x * kRows + threadIdx.x / 32; }
// 16 bytes of a matrix of T with rows of d, from a column on. The product can pass 2^31.
template <class T> __device__ Vec<T>& at(const void* matrix, int64_t row, int d, int column) {
  return *(Vec<T>*)((T*)matrix + row * d + column);
}

// out[slot[row][e]] = in[row]: read once, written once for each of its experts.
template <class T> __global__ void permute_kernel(const Rows r) {
  int64_t row = my_row();
  for (int c = threadIdx.x % 32 * Vec<T>::N; row < r.n && c < r.d; c += 32 * Vec<T>::N) {
    auto v = at<T>(r.in, row, r.d, c);
    for (int e = 0; e < r.E; e++) {
      int slot = r.slot[row * r.E + e];
      if (slot >= 0) at<T>(r.out, slot, r.d, c) = v;
    }
  }
}

// out[row] = the sum over e of gates[row][e] in[slot[row][e]], in fp32: each row fetches what is
// its own, so it is written once. Without gates they are 1: the gradient of permute.
template <class T> __global__ void unpermute_kernel(const Rows r) {
  int64_t row = my_row();
  for (int c = threadIdx.x % 32 * Vec<T>::N; row < r.n && c < r.d; c += 32 * Vec<T>::N) {
    float sum[Vec<T>::N] = {};
    for (int e = 0; e < r.E; e++) {
      int slot = r.slot[row * r.E + e];
      if (slot < 0) continue;
      float gate = r.gates ? r.gates[row * r.E + e] : 1.f;
      auto v = at<T>(r.in, slot, r.d, c);
      for (int i = 0; i < Vec<T>::N; i++) sum[i] += gate * to_float(v.v[i]);
    }
    Vec<T> o;
    for (int i = 0; i < Vec<T>::N; i++) o.v[i] = from_float<T>(sum[i]);
    at<T>(r.out, row, r.d, c) = o;
  }
}

// Its gradients: out[slot] = gate in[row], dgates[row][e] = <in[row], y[slot]>.
template <class T> __global__ void unpermute_grad_kernel(const Rows r) {
  int64_t row = my_row();
  for (int e = 0; row < r.n && e < r.E; e++) {         // from e = 1 on in[row] is in the L1 cache
    int slot = r.slot[row * r.E + e];
    float gate = r.gates[row * r.E + e], dot = 0;
    for (int c = threadIdx.x % 32 * Vec<T>::N; slot >= 0 && c < r.d; c += 32 * Vec<T>::N) {
      auto g = at<T>(r.in, row, r.d, c), v = at<T>(r.y, slot, r.d, c);
      Vec<T> o;
      for (int i = 0; i < Vec<T>::N; i++) {
        dot += to_float(g.v[i]) * to_float(v.v[i]);
        o.v[i] = from_float<T>(gate * to_float(g.v[i]));
      }
      at<T>(r.out, slot, r.d, c) = o;
    }
    for (int mask = 16; mask; mask /= 2) dot += __shfl_xor_sync(~0u, dot, mask);
    if (threadIdx.x % 32 == 0) r.dgates[row * r.E + e] = dot;   // 0 where not routed
  }
}

void route(const float* gates, int n, int E, int* slot, int* offs, cudaStream_t stream) {
  launch(route_kernel, 1, kWarps * 32, 0, stream, gates, n, E, slot, offs);
}
void start(void (*of_float)(Rows), void (*of_bf16)(Rows), const Rows& r) {
  launch(r.is_bf16 ? of_bf16 : of_float, (r.n + kRows - 1) / kRows, kRows * 32, 0, r.stream, r);
}
void permute(const Rows& r) { start(permute_kernel<float>, permute_kernel<bf16>, r); }
void unpermute(const Rows& r) { start(unpermute_kernel<float>, unpermute_kernel<bf16>, r); }
void unpermute_grad(const Rows& r) {
  start(unpermute_grad_kernel<float>, unpermute_grad_kernel<bf16>, r);
}

// Rows to experts and back: route, permute, unpermute and their gradients.
// No sort, no atomics, nothing depends on the order in which threads run.
#include "common.cuh"

// ---- route: gates (N, E) -> slot (N, E), offs (E) ----------------------------------------------
// A stable counting sort in one block. Thread i owns a stretch of rows: it counts their visits to
// each expert; a prefix sum over all counts, expert by expert, says where its visits begin; then
// it hands out the slots. The gates of 4 096 rows are 64 KB: one multiprocessor is enough.
constexpr int kRoute = 1024;

__device__ int prefix_in_warp(int x) {                 // the sum of lanes 0 to this one
  int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    int below = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

__global__ void __launch_bounds__(kRoute)
route_kernel(const float* gates, int n, int E, int* slot, int* offs) {
  int* count = dynamic_smem<int>();                    // (E, kRoute), then its prefix sums
  __shared__ int warp_sum[32];
  int tid = threadIdx.x, stretch = (n + kRoute - 1) / kRoute;
  int begin = min(tid * stretch, n), end = min(begin + stretch, n);
  for (int e = 0; e < E; e++) {
    int visits = 0;
    for (int row = begin; row < end; row++) visits += gates[(int64_t)row * E + e] != 0;
    count[e * kRoute + tid] = visits;
  }
  __syncthreads();

  int mine = 0;                                        // thread i sums the E counts from i * E on
  for (int i = 0; i < E; i++) mine += count[tid * E + i];
  int before = prefix_in_warp(mine);
  if (tid % 32 == 31) warp_sum[tid / 32] = before;
  __syncthreads();
  if (tid < 32) warp_sum[tid] = prefix_in_warp(warp_sum[tid]);
  __syncthreads();
  before += (tid < 32 ? 0 : warp_sum[tid / 32 - 1]) - mine;
  for (int i = 0; i < E; i++) {
    int visits = count[tid * E + i];
    count[tid * E + i] = before;
    before += visits;
  }
  __syncthreads();

  for (int e = 0; e < E; e++) {
    int next = count[e * kRoute + tid];
    for (int row = begin; row < end; row++) {
      int64_t at = (int64_t)row * E + e;
      slot[at] = gates[at] != 0 ? next++ : -1;
    }
    if (tid == kRoute - 1) offs[e] = next;             // the last thread's visits end the expert's
  }
}

// 16 bytes of a matrix of T with rows of d, from a column on. The product can pass 2^31.
template <class T> __device__ Vec<T>& at(const void* matrix, int64_t row, int d, int column) {
  return *(Vec<T>*)((T*)matrix + row * d + column);
}

// ---- permute: out[slot[row][e]] = x[row] -------------------------------------------------------
// A block for each row, read once and written once for each of its visits.
template <class T>
__global__ void permute_kernel(const Rows r) {
  int64_t row = blockIdx.x;
  for (int c = threadIdx.x * Vec<T>::N; c < r.d; c += blockDim.x * Vec<T>::N) {
    auto v = at<T>(r.x, row, r.d, c);
    for (int e = 0; e < r.E; e++) {
      int slot = r.slot[row * r.E + e];
      if (slot >= 0) at<T>(r.out, slot, r.d, c) = v;
    }
  }
}

// ---- unpermute: out[row] = sum over e of gates[row][e] y[slot[row][e]], in fp32 ----------------
// Each row fetches what belongs to it, so it is written once, and its sum has a fixed order.
// Without gates (null) they are 1: the gradient of permute.
template <class T>
__global__ void unpermute_kernel(const Rows r) {
  int64_t row = blockIdx.x;
  for (int c = threadIdx.x * Vec<T>::N; c < r.d; c += blockDim.x * Vec<T>::N) {
    float sum[Vec<T>::N] = {};
    for (int e = 0; e < r.E; e++) {
      int slot = r.slot[row * r.E + e];
      if (slot < 0) continue;
      float gate = r.gates ? r.gates[row * r.E + e] : 1.f;
      auto v = at<T>(r.y, slot, r.d, c);
      for (int i = 0; i < Vec<T>::N; i++) sum[i] += gate * to_float(v.v[i]);
    }
    Vec<T> o;
    for (int i = 0; i < Vec<T>::N; i++) o.v[i] = from_float<T>(sum[i]);
    at<T>(r.out, row, r.d, c) = o;
  }
}

// ---- its gradients: out[slot] = gate x[row], dgates[row][e] = <x[row], y[slot]> --------------
template <class T>
__global__ void unpermute_grad_kernel(const Rows r) {
  __shared__ float warp_dot[32];
  int64_t row = blockIdx.x;
  for (int e = 0; e < r.E; e++) {                      // from e = 1 on x[row] is in the L1 cache
    int slot = r.slot[row * r.E + e];
    float gate = r.gates[row * r.E + e], dot = 0;
    for (int c = threadIdx.x * Vec<T>::N; slot >= 0 && c < r.d; c += blockDim.x * Vec<T>::N) {
      auto g = at<T>(r.x, row, r.d, c), v = at<T>(r.y, slot, r.d, c);
      Vec<T> o;
      for (int i = 0; i < Vec<T>::N; i++) {
        dot += to_float(g.v[i]) * to_float(v.v[i]);
        o.v[i] = from_float<T>(gate * to_float(g.v[i]));
      }
      at<T>(r.out, slot, r.d, c) = o;
    }
    for (int mask = 16; mask; mask /= 2) dot += __shfl_xor_sync(~0u, dot, mask);
    if (threadIdx.x % 32 == 0) warp_dot[threadIdx.x / 32] = dot;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned w = 1; w < blockDim.x / 32; w++) dot += warp_dot[w];
      r.dgates[row * r.E + e] = dot;                   // 0 where there is no visit
    }
    __syncthreads();                                   // warp_dot is written again for the next e
  }
}

// ---- launchers ---------------------------------------------------------------------------------
void route(const float* gates, int n, int E, int* slot, int* offs, cudaStream_t stream) {
  launch(route_kernel, 1, kRoute, E * kRoute * sizeof(int), stream, gates, n, E, slot, offs);
}
// A block a row, of whole warps, with as many threads as the row has pieces of 16 bytes.
void start(void (*of_float)(Rows), void (*of_bf16)(Rows), const Rows& r) {
  int pieces = r.d * (r.is_bf16 ? 2 : 4) / 16, threads = min(1024, (pieces + 31) / 32 * 32);
  launch(r.is_bf16 ? of_bf16 : of_float, r.n, threads, 0, r.stream, r);
}
void permute(const Rows& r) { start(permute_kernel<float>, permute_kernel<bf16>, r); }
void unpermute(const Rows& r) { start(unpermute_kernel<float>, unpermute_kernel<bf16>, r); }
void unpermute_grad(const Rows& r) {
  start(unpermute_grad_kernel<float>, unpermute_grad_kernel<bf16>, r);
}

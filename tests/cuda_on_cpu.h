// Runs CUDA kernels without a GPU: the .cu files compiled as C++ with -DCUDA_ON_CPU and this header.
//
// Every CUDA thread is a fiber: a stack of its own, on one thread of the CPU. A fiber runs until it
// must wait for others, then the next one runs. Shared memory begins as NaN in every block. A copy or
// a wgmma takes effect as late as the rules allow: at the wait for it, or, of copies, when all wait.
// So a barrier or a wait that is missing shows in the results, and one that can never end is reported.
// What is not modelled: time, caches, fences between memory proxies, several blocks at once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// What a test sets, through ctypes.
extern "C" {
__attribute__((used)) inline int cuda_on_cpu_order = 0;    // 0 forward, 1 reverse, more: random seeds
__attribute__((used)) inline int cuda_on_cpu_blocks = 3;   // "multiprocessors"
__attribute__((used)) inline int cuda_on_cpu_only = -1;    // run this block alone; -1: all
}

// ---- CUDA's language ---------------------------------------------------------------------------
#define __global__
#define __device__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
inline int min(int a, int b) { return a < b ? a : b; }
inline float __expf(float x) { return std::exp(x); }

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 x) {
  return __builtin_bit_cast(float, (uint32_t)x.bits << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {           // to the nearest, of two the even one
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {0x7FFF};
  return {(uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}

// ---- fibers ------------------------------------------------------------------------------------
// Saves the registers that a call must keep, and goes on where the other stack stopped.
extern "C" void cpu_switch(void** save_stack, void* load_stack);
asm(".text\n.p2align 4\n.weak cpu_switch\ncpu_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

namespace cpu {
constexpr size_t kStack = 96 << 10;
using Work = std::function<void()>;
struct Barrier { int arrived = 0, phase = 0; };
struct Thread {
  void* stack_top;
  uint3 tid;
  int index, parity = 0;
  bool done = false;
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Work>> mmas{1};                   // groups that were not yet waited for
};
struct Warp {
  Barrier barrier;
  alignas(16) char slot[2][32][16];
};
struct Block {
  uint3 idx{};
  dim3 dim, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::deque<Work> copies;                                 // asked for, not yet there
  int idle = 0;                                            // switches since something happened
  std::string error;
  int size() const { return (int)threads.size(); }
};
inline Block* block;
inline Thread* self;
inline void* host;
inline Work body;
alignas(1024) inline char smem[228 << 10];

inline bool is_random() { return cuda_on_cpu_order > 1; }
inline unsigned dice = 1;
inline unsigned roll() { return (dice = dice * 1664525u + 1013904223u) >> 16; }
inline bool chance(int n) { return is_random() && roll() % n == 0; }

inline void next_thread() {                                // go on in a fiber that has not ended
  Thread* from = self;
  int n = block->size(), step = cuda_on_cpu_order == 1 ? n - 1 : 1;
  int i = is_random() ? roll() % n : (from->index + step) % n;
  for (int tries = 0; tries < n && block->threads[i].done; tries++) i = (i + step) % n;
  if (block->threads[i].done || !block->error.empty()) {   // none left, or none can go on
    void* dead;
    cpu_switch(&dead, host);
  }
  if (i == from->index) return;
  self = &block->threads[i];
  cpu_switch(&from->stack_top, self->stack_top);
}
template <class Ready> void wait_until(Ready ready) {
  while (!ready()) {
    bool stuck = ++block->idle > (is_random() ? 40 : 2) * block->size();
    if (!block->copies.empty() && (stuck || chance(8))) {  // all wait, or by chance earlier
      Work copy = block->copies.front();
      block->copies.pop_front();
      block->idle = 0;
      copy();
      continue;
    }
    if (stuck)
      block->error = "deadlock: block " + std::to_string(block->idx.x) + ", thread " +
                     std::to_string(self->index);
    next_thread();
  }
  block->idle = 0;
}
inline void meet(Barrier& b, int expected) {
  int phase = b.phase;
  block->idle = 0;
  if (++b.arrived == expected) b.arrived = 0, ++b.phase;
  else wait_until([&] { return b.phase != phase; });
}
inline void run_thread() {
  body();
  self->done = true;
  block->idle = 0;
  next_thread();
}
inline void run_block() {
  Block& b = *block;
  memset(smem, 0xFF, sizeof smem);                         // 0xFFFF is a NaN of bf16
  for (int i = 0; i < b.size(); i++) {
    Thread& t = b.threads[i];
    t.done = false, t.index = i, t.tid = {(unsigned)i, 0, 0};
    if (!t.stack) t.stack.reset(new char[kStack]);
    void** top = (void**)((uintptr_t)(t.stack.get() + kStack) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void*)run_thread;
    for (int r = 0; r < 6; r++) *--top = nullptr;          // what cpu_switch pops
    t.stack_top = top;
  }
  self = &b.threads[cuda_on_cpu_order == 1 ? b.size() - 1 : 0];
  cpu_switch(&host, self->stack_top);
  if (!b.error.empty()) throw std::runtime_error(b.error);
}
}  // namespace cpu

#define threadIdx (cpu::self->tid)
#define blockIdx (cpu::block->idx)
#define blockDim (cpu::block->dim)
#define gridDim (cpu::block->grid)
#define __syncthreads() cpu::meet(cpu::block->barriers[0], cpu::block->size())

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t smem_bytes, cudaStream_t,
            const Args&... args) {
  if (smem_bytes > sizeof cpu::smem) throw std::runtime_error("too much shared memory");
  cpu::Block block{.dim = dim3(threads), .grid = grid};
  block.threads.resize(threads);
  block.warps.resize((threads + 31) / 32);
  cpu::block = &block;
  cpu::body = [&] { kernel(args...); };
  cpu::dice = cuda_on_cpu_order;
  int n = grid.x * grid.y;
  for (int i = 0; i < n; i++) {                            // blocks too run in either order
    unsigned b = cuda_on_cpu_order % 2 ? n - 1 - i : i;
    block.idx = {b % grid.x, b / grid.x, 0};
    if (cuda_on_cpu_only < 0 || cuda_on_cpu_only == (int)b) cpu::run_block();
  }
}

// All 32 lanes put a value down, then every lane sees all of them.
template <class T> const T* warp_exchange(T mine) {
  static_assert(sizeof(T) <= 16);
  auto& w = cpu::block->warps[cpu::self->index / 32];
  T* all = (T*)w.slot[cpu::self->parity ^= 1];
  all[cpu::self->index % 32] = mine;
  cpu::meet(w.barrier, 32);
  return all;
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {
  return warp_exchange(v)[cpu::self->index % 32 ^ mask];
}
template <class T> T __shfl_sync(unsigned, T v, int lane) { return warp_exchange(v)[lane]; }
template <class T> T __shfl_up_sync(unsigned, T v, int n) {
  auto all = warp_exchange(v);
  int lane = cpu::self->index % 32;
  return all[lane < n ? lane : lane - n];
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  auto all = warp_exchange(mine);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= (unsigned)all[lane] << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// ---- cuda/ptx.cuh ------------------------------------------------------------------------------
template <class T> T* dynamic_smem() { return (T*)cpu::smem; }
inline uint32_t smem_addr(const void* p) { return (uint32_t)((const char*)p - cpu::smem); }

struct MBarrier {
  int16_t count, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(MBarrier) == 8);
inline MBarrier& mbar(uint64_t* b) { return *(MBarrier*)b; }
inline void mbar_update(MBarrier& m) {
  cpu::block->idle = 0;
  if (m.pending == 0 && m.bytes == 0) m.pending = m.count, m.phase ^= 1;
}
inline void mbarrier_init(uint64_t* b, int n) { mbar(b) = {(int16_t)n, (int16_t)n, 0, 0}; }
inline void fence_barrier_init() {}
inline void mbarrier_arrive(uint64_t* b) {
  --mbar(b).pending;
  mbar_update(mbar(b));
  if (cpu::chance(2)) cpu::next_thread();
}
inline void mbarrier_expect_bytes(uint64_t* b, int bytes) {
  mbar(b).bytes += bytes;
  --mbar(b).pending;
  mbar_update(mbar(b));
}
inline void mbarrier_wait(uint64_t* b, int parity) {
  cpu::wait_until([&] { return mbar(b).phase != (unsigned)parity; });
}
inline void named_barrier(int id, int threads) { cpu::meet(cpu::block->barriers[id], threads); }
inline void fence_async_proxy() {}
template <int> void give_regs() {}
template <int> void take_regs() {}

struct TensorMap {
  const char* base;
  int64_t experts, rows, cols;
  int box_rows;
};
inline TensorMap tensor_map(const void* base, int64_t experts, int64_t rows, int64_t cols,
                            int box_rows) {
  return {(const char*)base, experts, rows, cols, box_rows};
}
inline char* swizzled(uint32_t address) {
  return cpu::smem + (address ^ (address >> 7 & 7) << 4);
}
inline void tma_load(void* to, const TensorMap& map, uint64_t* b, int col, int row, int expert) {
  cpu::block->copies.push_back([=] {
    for (int r = 0; r < map.box_rows; r++)
      for (int c = 0; c < 64; c++) {
        int64_t y = row + r, x = col + c;
        bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.cols && expert < map.experts;
        uint16_t v = 0;
        if (inside) memcpy(&v, map.base + ((expert * map.rows + y) * map.cols + x) * 2, 2);
        memcpy(swizzled(smem_addr(to) + r * 128 + c * 2), &v, 2);
      }
    mbar(b).bytes -= map.box_rows * 128;
    mbar_update(mbar(b));
  });
}

inline void wgmma_fence() {                                // the four warps start together
  cpu::meet(cpu::block->barriers[8 + cpu::self->index / 128], 128);
}
inline void wgmma_commit() { cpu::self->mmas.emplace_back(); }
inline void wgmma_wait() {
  auto& groups = cpu::self->mmas;
  for (; groups.size() > 1; groups.pop_front())
    for (auto& work : groups.front()) work();
  warp_exchange(0);
}
// Element (mn, k) of an operand, from its descriptor: start, step between panels, between 8 rows.
inline float element(uint64_t d, bool turned, int mn, int k) {
  uint32_t start = (d & 0x3FFF) << 4, panels = (d >> 16 & 0x3FFF) << 4, rows = (d >> 32 & 0x3FFF) << 4;
  uint32_t at = turned ? start + mn % 64 * 2 + mn / 64 * panels + k % 8 * 128 + k / 8 * rows
                       : start + mn % 8 * 128 + mn / 8 * rows + k * 2;
  __nv_bfloat16 v;
  memcpy(&v, swizzled(at), 2);
  return __bfloat162float(v);
}
template <int TurnedA, int TurnedB>
void wgmma_m64n256k16(float (&d)[32][4], uint64_t a, uint64_t b) {
  auto sums = &d;
  int t = cpu::self->index % 128, row = t / 32 * 16 + t % 32 / 4;
  cpu::self->mmas.back().push_back([=] {
    float A[2][16];
    for (int h = 0; h < 2; h++)
      for (int k = 0; k < 16; k++) A[h][k] = element(a, TurnedA, row + h * 8, k);
    for (int j = 0; j < 32; j++)
      for (int c = 0; c < 2; c++) {
        float s[2] = {};
        for (int k = 0; k < 16; k++) {
          float v = element(b, TurnedB, j * 8 + t % 4 * 2 + c, k);
          s[0] += A[0][k] * v, s[1] += A[1][k] * v;
        }
        for (int h = 0; h < 2; h++) (*sums)[j][h * 2 + c] += s[h];
      }
  });
}

// Runs CUDA kernels without a GPU: the .cu files compiled as C++ with -DCUDA_ON_CPU and this file.
// The PTX of cuda/ptx.cuh is interpreted: its texts are looked up in a table, see kInstructions.
//
// Every CUDA thread is a fiber: a stack of its own, on one thread of the CPU. A fiber runs until it
// must wait for others, then the next one runs; if not in random order, one of its warp if possible,
// so that other warps are as far behind as they may be. Shared memory begins as NaN in every block.
// A copy or a wgmma takes effect as late as the rules allow: at the wait for it, or, of TMA's
// copies, when all wait. But cp.async at once in reverse order, and in a random order some of both.
// So a missing barrier or wait shows in the results, and one that can never end is reported. wgmma
// reads a second copy of shared memory, which what threads write reaches only at a fence.
// What is not modelled: time, caches, several blocks at once, whose writes a fence is for.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// What a test sets, through ctypes.
extern "C" {
__attribute__((used)) inline int cuda_on_cpu_order = 0;   // 0 forward, 1 reverse, more: random
__attribute__((used)) inline int cuda_on_cpu_blocks = 3;  // "multiprocessors"
__attribute__((used)) inline int cuda_on_cpu_only = -1;   // run this block alone; -1: all
__attribute__((used)) inline int cuda_on_cpu_trace = 0;   // 1: print who waits for what
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
struct int2 { int x, y; };
inline int min(int a, int b) { return a < b ? a : b; }

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
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
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
  int index, parity = 0, regs = 0;
  bool done = false, fenced = false;                       // since the last wait for a wgmma
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Work>> mmas{1}, copies{1};        // groups that were not yet waited for
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
  int pool = 0;                                            // registers that were given back
  // Are there mbarriers that the copy engine, or that other threads, may not see yet?
  bool new_barriers = false, unsynced_barriers = false;
  std::vector<uint64_t> mbarriers;                         // where they are
  std::string error;
  int size() const { return (int)threads.size(); }
};
inline Block* block;
inline Thread* self;
inline void* host;
inline Work body;
alignas(1024) inline char smem[228 << 10], async_smem[228 << 10];
inline size_t smem_used;

inline bool is_random() { return cuda_on_cpu_order > 1; }
inline unsigned dice = 1;
inline unsigned roll() { return (dice = dice * 1664525u + 1013904223u) >> 16; }
inline bool chance(int n) { return is_random() && roll() % n == 0; }

inline void next_thread() {                                // go on in a fiber that has not ended
  Thread* from = self;
  int n = block->size(), step = cuda_on_cpu_order == 1 ? n - 1 : 1;
  int i = is_random() ? roll() % n : (from->index + step) % n;
  if (!is_random() && block->idle < 32) i = from->index / 32 * 32 + (from->index + step) % 32;
  for (int tries = 0; tries < n && block->threads[i].done; tries++) i = (i + step) % n;
  if (block->threads[i].done || !block->error.empty()) {   // none left, or none can go on
    void* dead;
    cpu_switch(&dead, host);
  }
  if (i == from->index) return;
  self = &block->threads[i];
  cpu_switch(&from->stack_top, self->stack_top);
}
inline void fail(const std::string& why) {                 // ends the kernel
  auto text = [](int n) { return std::to_string(n); };
  block->error = why + ": block " + text(block->idx.x) + ", thread " + text(self->index);
  next_thread();
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
    if (stuck) fail("deadlock");
    next_thread();
  }
  block->idle = 0;
}
// Printed if traced, of one thread in 128.
template <class... Args> void trace(const char* text, Args... args) {
  if (!cuda_on_cpu_trace || self->index % 128) return;
  printf("thread %3d ", self->index);
  printf(text, args...);
}
inline void meet(Barrier& b, int expected, int traced = -1) {
  int phase = b.phase;
  block->idle = 0;
  if (++b.arrived == expected) b.arrived = 0, ++b.phase;
  if (b.phase != phase) return;
  if (traced >= 0) trace("waits for barrier %d\n", traced);
  wait_until([&] { return b.phase != phase; });
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
  memset(async_smem, 0xFF, sizeof smem);
  b.pool = 0, b.mbarriers.clear();
  for (int i = 0; i < b.size(); i++) {
    Thread& t = b.threads[i];
    t.done = t.fenced = false, t.index = i, t.tid = {(unsigned)i, 0, 0};
    t.regs = 65536 / b.size() / 8 * 8;
    if (!t.stack) t.stack.reset(new char[kStack]);
    void** top = (void**)((uintptr_t)(t.stack.get() + kStack) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void*)run_thread;
    for (int r = 0; r < 6; r++) *--top = nullptr;          // what cpu_switch pops
    t.stack_top = top;
  }
  self = &b.threads[cuda_on_cpu_order == 1 ? b.size() - 1 : 0];
  cpu_switch(&host, self->stack_top);
  if (b.error.empty() && b.pool) b.error = "registers were given back that nobody takes";
  if (!b.error.empty()) throw std::runtime_error(b.error);
}
}  // namespace cpu

#define threadIdx (cpu::self->tid)
#define blockIdx (cpu::block->idx)
#define blockDim (cpu::block->dim)
#define gridDim (cpu::block->grid)
#define __syncthreads() \
  (cpu::meet(cpu::block->barriers[0], cpu::block->size(), 0), \
   cpu::block->unsynced_barriers = false)

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t smem_bytes, cudaStream_t,
            const Args&... args) {
  if (smem_bytes > sizeof cpu::smem) throw std::runtime_error("too much shared memory");
  cpu::smem_used = smem_bytes;
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

// ---- what cuda/ptx.cuh needs -------------------------------------------------------------------
#define DEV inline
#define U32(x) (uint64_t)(x)
#define U64(x) (uint64_t)(x)
#define CONST(x) (uint64_t)(x)
#define PTX(text, ...) [&] {                                                  \
    static const auto& instruction = cpu::find(text);                         \
    instruction(std::array<uint64_t, 6>{__VA_ARGS__}.data()); }()
#define PTX80 PTX
#define PTX_SUMS(text, d, ...) cpu::wgmma(text, d, {__VA_ARGS__})
#define PTX_LOAD4(text, r, x) cpu::ldmatrix(text, r, x)
#define PTX_MMA(text, d, a, b0, b1) cpu::mma(text, d, a, b0, b1)
#define PTX_FLOAT(text, y, x) y = cpu::kOfFloat.at(text)(x)
template <class T> T* dynamic_smem() { return (T*)cpu::smem; }
inline uint32_t smem_addr(const void* p) { return (uint32_t)((const char*)p - cpu::smem); }

// The driver's part of TMA; what the manual forbids is refused.
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
struct CUtensorMap {
  const char* base;
  int64_t size[3], stride[3];                              // the latter in bytes
  int box[3], swizzle;
};
enum { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum { cudaEnableDefault, CU_TENSOR_MAP_INTERLEAVE_NONE = 0, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0};
enum { CU_TENSOR_MAP_SWIZZLE_32B = 1, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B };
inline int cuTensorMapEncodeTiled(CUtensorMap* map, int type, uint32_t rank, void* base,
                                  const uint64_t* size, const uint64_t* stride,
                                  const uint32_t* box, const uint32_t* step, int interleave,
                                  int swizzle, int, int fill) {
  *map = {(const char*)base, {}, {2}, {}, swizzle};
  bool wrong = type != 9 || rank != 3 || interleave || fill || (uintptr_t)base % 16 ||
               (swizzle && box[0] * 2 > 16u << swizzle);
  for (int i = 0; i < 3; i++) {
    map->size[i] = size[i], map->box[i] = box[i];
    if (i) map->stride[i] = stride[i - 1], wrong |= stride[i - 1] % 16 != 0;
    wrong |= size[i] == 0 || size[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || step[i] != 1;
  }
  return wrong;
}
struct cudaDriverEntryPointQueryResult {};
inline int cudaGetDriverEntryPointByVersion(const char* name, void** found, int, int, void*) {
  if (std::string(name) == "cuTensorMapEncodeTiled") *found = (void*)cuTensorMapEncodeTiled;
  return 0;
}
inline void check(int error) { if (error) throw std::runtime_error("CUDA"); }

// ---- PTX, as NVIDIA's manual has it ------------------------------------------------------------
namespace cpu {
struct MBarrier {
  int16_t count, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
inline MBarrier& mbar(uint64_t address) { return *(MBarrier*)(smem + address); }
// Its number in the order in which they were initialised.
inline int number(uint64_t address) {
  auto& all = block->mbarriers;
  return std::find(all.begin(), all.end(), address) - all.begin();
}
inline void update(uint64_t address, int arrivals, int bytes) {
  MBarrier& m = mbar(address);
  m.pending -= arrivals, m.bytes += bytes, block->idle = 0;
  if (m.pending == 0 && m.bytes == 0) m.pending = m.count, m.phase ^= 1;
}
// Swizzle: the last bits of the number of a 128-byte row are mixed into that of a 16-byte piece.
inline uint32_t swizzled(uint32_t address, int bits) {
  return address ^ (address >> 7 & ((1 << bits) - 1)) << 4;
}
inline void load_box(uint32_t to, const CUtensorMap& map, uint64_t barrier, const int (&from)[3]) {
  if (block->new_barriers) fail("a copy before the fence of its mbarrier");
  block->copies.push_back([=] {
    int n = map.box[0] * map.box[1] * map.box[2];
    for (int i = 0, rest = 0; i < n; rest = ++i) {
      const char* source = map.base;
      bool inside = true;
      for (int k = 0; k < 3; rest /= map.box[k++]) {
        int64_t x = from[k] + rest % map.box[k];
        inside &= 0 <= x && x < map.size[k], source += x * map.stride[k];
      }
      uint16_t v = 0;
      if (inside) memcpy(&v, source, 2);
      for (char* view : {smem, async_smem}) memcpy(view + swizzled(to + i * 2, map.swizzle), &v, 2);
    }
    if (cuda_on_cpu_trace) printf("a box of %d bytes comes, mbarrier %d\n", 2 * n, number(barrier));
    update(barrier, 0, -2 * n);
  });
}

using Operands = const uint64_t*;
inline const std::map<std::string, std::function<void(Operands)>> kInstructions = {
    {"mbarrier.init.shared::cta.b64 [%0], %1;", [](Operands o) {
       block->new_barriers = block->unsynced_barriers = true;
       mbar(o[0]) = {(int16_t)o[1], (int16_t)o[1], 0, 0};
       block->mbarriers.push_back(o[0]);
     }},
    {"fence.mbarrier_init.release.cluster;", [](Operands) { block->new_barriers = false; }},
    {"mbarrier.arrive.shared::cta.b64 _, [%0];", [](Operands o) {
       trace("arrives at mbarrier %d\n", number(o[0]));
       update(o[0], 1, 0);
       if (chance(2)) next_thread();
     }},
    {"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
     [](Operands o) {
       trace("expects %d bytes at mbarrier %d\n", (int)o[1], number(o[0]));
       update(o[0], 1, o[1]);
     }},
    {"{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
     "@!done bra again;\n}",
     [](Operands o) {
       if (block->unsynced_barriers) fail("a wait for an mbarrier before __syncthreads");
       if (mbar(o[0]).phase == o[1]) trace("waits for mbarrier %d, %d\n", number(o[0]), (int)o[1]);
       wait_until([=] { return mbar(o[0]).phase != o[1]; });
     }},
    {"bar.sync %0, %1;", [](Operands o) { meet(block->barriers[o[0]], o[1], o[0]); }},
    {"fence.proxy.async.shared::cta;", [](Operands) { memcpy(async_smem, smem, smem_used); }},
    {"setmaxnreg.dec.sync.aligned.u32 %0;", [](Operands o) {
       if ((int)o[0] > self->regs || o[0] < 24 || o[0] % 8) fail("setmaxnreg.dec");
       block->pool += self->regs - o[0], self->regs = o[0];
     }},
    {"setmaxnreg.inc.sync.aligned.u32 %0;", [](Operands o) {
       if ((int)o[0] < self->regs || o[0] > 256 || o[0] % 8) fail("setmaxnreg.inc");
       wait_until([=] { return block->pool >= (int)o[0] - self->regs; });
       block->pool -= o[0] - self->regs, self->regs = o[0];
     }},
    {"cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
     " [%0], [%1, {%2, %3, %4}], [%5];", [](Operands o) {
       load_box(o[0], *(const CUtensorMap*)o[1], o[5], {(int)o[2], (int)o[3], (int)o[4]});
     }},
    {"cp.async.cg.shared.global [%0], [%1], 16, %2;", [](Operands o) {
       uint64_t to = o[0], from = o[1], bytes = o[2];
       if (to % 16 || from % 16 || to + 16 > smem_used || bytes > 16) fail("cp.async");
       auto copy = [=] {
         memset(smem + to, 0, 16);
         memcpy(smem + to, (const void*)from, bytes);
       };
       if (cuda_on_cpu_order == 1 || chance(2)) copy();
       else self->copies.back().push_back(copy);
     }},
    {"cp.async.commit_group;", [](Operands) { self->copies.emplace_back(); }},
    {"cp.async.wait_group %0;", [](Operands o) {
       for (auto& groups = self->copies; groups.size() > o[0] + 1; groups.pop_front())
         for (auto& work : groups.front()) work();
     }},
    {"wgmma.fence.sync.aligned;", [](Operands) {           // the four warps start together
       meet(block->barriers[8 + self->index / 128], 128);
       self->fenced = true;
     }},
    {"wgmma.commit_group.sync.aligned;", [](Operands) { self->mmas.emplace_back(); }},
    {"wgmma.wait_group.sync.aligned 0;", [](Operands) {
       for (auto& groups = self->mmas; groups.size() > 1; groups.pop_front())
         for (auto& work : groups.front()) work();
       self->fenced = false;
       warp_exchange(0);
     }}};
inline const auto& find(const char* text) {
  static const std::function<void(Operands)> unknown = [](Operands) { fail("unknown PTX"); };
  auto found = kInstructions.find(text);
  return found == kInstructions.end() ? unknown : found->second;
}
inline const std::map<std::string, float (*)(float)> kOfFloat = {        // as wrong as they may be
    {"ex2.approx.ftz.f32 %0, %1;", [](float x) { return std::exp2(x) * (1 + 0x1p-22f); }},
    {"rcp.approx.ftz.f32 %0, %1;", [](float x) { return 1 / x * (1 - 0x1p-23f); }}};

// Element (mn, k) of an operand, from its descriptor: start, step between panels, between 8 rows.
inline float element(uint64_t d, bool turned, int mn, int k) {
  uint32_t start = (d & 0x3FFF) << 4, panels = (d >> 16 & 0x3FFF) << 4;
  uint32_t rows = (d >> 32 & 0x3FFF) << 4;
  uint32_t at = turned ? start + mn % 64 * 2 + mn / 64 * panels + k % 8 * 128 + k / 8 * rows
                       : start + mn % 8 * 128 + mn / 8 * rows + k * 2;
  __nv_bfloat16 v;
  memcpy(&v, async_smem + swizzled(at, (4 - (d >> 62)) % 4), 2);
  return __bfloat162float(v);
}
// Lane l names row l % 8 of matrix l / 8; what it gets of each is in the manual's figures.
inline void ldmatrix(const std::string& text, uint32_t (&r)[4], uint32_t address) {
  bool turned = text == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];";
  if (!turned && text != "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];")
    fail("unknown PTX");
  if (address % 16) fail("ldmatrix: not a multiple of 16 bytes");
  auto rows = warp_exchange(address);
  for (int i = 0, lane = self->index % 32; i < 8; i++) {
    int row = lane / 4, column = lane % 4 * 2 + i % 2, matrix = i / 2;
    if (turned) std::swap(row, column);
    memcpy((char*)r + i * 2, smem + rows[matrix * 8 + row] + column * 2, 2);
  }
}
using Quarters = std::array<uint32_t, 4>;
inline float half_of(uint32_t pair, int i) {
  return __bfloat162float({(uint16_t)(pair >> i * 16)});
}
inline void mma(const std::string& text, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                uint32_t b1) {
  static const std::string known = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                                   "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};";
  if (text != known) fail("unknown PTX");
  int lane = self->index % 32;
  Quarters A[4];                                           // of the four lanes with this row
  memcpy(A, warp_exchange(Quarters{a[0], a[1], a[2], a[3]}) + lane / 4 * 4, sizeof A);
  auto B = warp_exchange(std::array<uint32_t, 2>{b0, b1});
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++)
      d[i] += half_of(A[k % 8 / 2][i / 2 + k / 8 * 2], k % 2) *
              half_of(B[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][k / 8], k % 2);
}
inline std::string wgmma_text() {
  std::string text = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0";
  for (int i = 1; i < 128; i++) text += ",%" + std::to_string(i);
  return text + "}, %128, %129, 1, 1, 1, %130, %131;";
}
struct Matrices { uint64_t a, b, turned_a, turned_b; };
inline void wgmma(const char* text, float (&d)[32][4], Matrices m) {
  static const bool known = text == wgmma_text();
  auto sums = &d;
  int t = self->index % 128, row = t / 32 * 16 + t % 32 / 4;
  if (!known) fail("unknown PTX");
  if (!self->fenced) fail("wgmma without wgmma.fence");
  if ((m.a | m.b) & 0x3FFFC000C000C000) fail("wgmma: bits of a descriptor that must be 0");
  self->mmas.back().push_back([=] {
    float A[2][16];
    for (int h = 0; h < 2; h++)
      for (int k = 0; k < 16; k++) A[h][k] = element(m.a, m.turned_a, row + h * 8, k);
    for (int j = 0; j < 32; j++)
      for (int c = 0; c < 2; c++) {
        float s[2] = {};
        for (int k = 0; k < 16; k++) {
          float v = element(m.b, m.turned_b, j * 8 + t % 4 * 2 + c, k);
          s[0] += A[0][k] * v, s[1] += A[1][k] * v;
        }
        for (int h = 0; h < 2; h++) (*sums)[j][h * 2 + c] += s[h];
      }
  });
}
}  // namespace cpu

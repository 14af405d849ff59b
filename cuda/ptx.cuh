// The machine instructions that the matmuls use, one small function each. In NVIDIA's "PTX ISA"
// each has a section under its name. tests/cuda_on_cpu.h defines the macros for a CPU: there
// the same texts are looked up and carried out.
#pragma once
#ifndef CUDA_ON_CPU
#define DEV __device__ __forceinline__
#define U32(x) "r"(x)                                   // operands: %0, %1, ... of the text
#define U64(x) "l"(x)
#define CONST(x) "n"(x)
#define PTX80(text, ...) asm volatile(text ::__VA_ARGS__ : "memory")    // from sm_80 on
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)                  // built for sm_90a
#define PTX PTX80
#define PTX_SUMS(text, d, ...) asm volatile(text : ALL_OF(d) : __VA_ARGS__)
#else                                                   // others compile too, and stop if called
#define PTX(...) __trap()
#define PTX_SUMS(...) __trap()
#endif
#define PTX_FLOAT(text, y, x) asm(text : "=f"(y) : "f"(x))
#define PTX_LOAD4(text, r, x) \
  asm volatile(text : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : U32(x) : "memory")
#define PTX_MMA(text, d, a, b0, b1) \
  asm volatile(text : FOUR(d) : U32(a[0]), U32(a[1]), U32(a[2]), U32(a[3]), U32(b0), U32(b1))
#define FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define R4(d, i) FOUR(d[i]), FOUR(d[i + 1]), FOUR(d[i + 2]), FOUR(d[i + 3])
#define ALL_OF(d) \
  R4(d, 0), R4(d, 4), R4(d, 8), R4(d, 12), R4(d, 16), R4(d, 20), R4(d, 24), R4(d, 28)
template <class T> DEV T* dynamic_smem() {              // the block's shared memory
  extern __shared__ __align__(1024) char smem[];
  return (T*)smem;
}
DEV uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
#endif
// Approximations of 2^x and 1/x, to 2 and 1 units in the last place; results below 2^-126 are 0.
DEV float exp2_approx(float x) {
  float y;
  PTX_FLOAT("ex2.approx.ftz.f32 %0, %1;", y, x);
  return y;
}
DEV float rcp_approx(float x) {
  float y;
  PTX_FLOAT("rcp.approx.ftz.f32 %0, %1;", y, x);
  return y;
}
// ---- from compute capability 8.0 on -------------------------------------------------------------
// A thread asks for 16 bytes, or zeros, to be brought to shared memory; both aligned. Requests up
// to a commit are a group; wait<N> is for all of this thread's groups but the last N.
DEV void cp_async(void* to, const void* from, bool inside) {
  PTX80("cp.async.cg.shared.global [%0], [%1], 16, %2;", U32(smem_addr(to)), U64(from),
        U32(inside ? 16 : 0));
}
DEV void cp_async_commit() { PTX80("cp.async.commit_group;"); }
template <int N> DEV void cp_async_wait() { PTX80("cp.async.wait_group %0;", CONST(N)); }
// Four matrices of 8 x 8 bf16; lane l names 8 numbers: row l % 8 of matrix l / 8. It gets two of
// each: columns 2 (lane % 4) and the next of row lane / 4, or, transposed, rows of a column.
template <bool trans> DEV void ldmatrix(uint32_t (&r)[4], const void* row) {
  if (trans) PTX_LOAD4("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];", r,
                       smem_addr(row));
  else PTX_LOAD4("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];", r,
                 smem_addr(row));
}
// A warp adds 16 x 16 by 16 x 8 to d: columns 2 (lane % 4) and the next of row lane / 4, and of the
// row 8 below. a: the quarters of its operand, k 0 to 7 first; b0, b1: k 0 to 7, 8 to 15.
DEV void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  PTX_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};", d, a, b0, b1);
}
// ---- Hopper: barriers ---------------------------------------------------------------------------
// An mbarrier lies in shared memory and counts arrivals and bytes. When all that it waits for has
// come, its phase (0, 1, 0, ...) ends; whoever waits names the phase's parity.
DEV void mbarrier_init(uint64_t* b, int arrivals) {
  PTX("mbarrier.init.shared::cta.b64 [%0], %1;", U32(smem_addr(b)), U32(arrivals));
}
DEV void fence_barrier_init() { PTX("fence.mbarrier_init.release.cluster;"); }
DEV void mbarrier_arrive(uint64_t* b) {
  PTX("mbarrier.arrive.shared::cta.b64 _, [%0];", U32(smem_addr(b)));
}
DEV void mbarrier_expect_bytes(uint64_t* b, int bytes) {       // an arrival too
  PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", U32(smem_addr(b)), U32(bytes));
}
DEV void mbarrier_wait(uint64_t* b, int parity) {
  PTX("{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}",
      U32(smem_addr(b)), U32(parity));
}
DEV void named_barrier(int id, int threads) {           // __syncthreads() of some of the warps
  PTX("bar.sync %0, %1;", U32(id), U32(threads));
}
// What threads wrote to shared memory before it, the copy engine and wgmma see after it.
DEV void fence_async_proxy() { PTX("fence.proxy.async.shared::cta;"); }
// A warpgroup (128 threads) gives registers back, or takes some: 64 K for the whole block.
template <int N> DEV void give_regs() { PTX("setmaxnreg.dec.sync.aligned.u32 %0;", CONST(N)); }
template <int N> DEV void take_regs() { PTX("setmaxnreg.inc.sync.aligned.u32 %0;", CONST(N)); }
// ---- TMA: one thread asks for a box of a matrix, the copy engine brings it ----------------------
using TensorMap = CUtensorMap;
// bf16 (experts, rows, cols), read in boxes of 1 x box_rows x 64. A box's row takes 128 bytes of
// shared memory, its 16-byte pieces in an order that depends on the row ("128-byte swizzle"): so
// columns too are read without bank conflicts. What lies outside an expert's matrix is read as 0.
inline TensorMap tensor_map(const void* base, int64_t experts, int64_t rows, int64_t cols,
                            int box_rows) {
  static void* encode = nullptr;                        // the driver's, found without linking to it
  cudaDriverEntryPointQueryResult q;
  if (!encode) check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                      cudaEnableDefault, &q));
  if (!encode) throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled");
  cuuint64_t size[] = {(cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)experts};
  cuuint64_t stride[] = {size[0] * 2, size[0] * size[1] * 2};           // bytes
  cuuint32_t box[] = {64, (cuuint32_t)box_rows, 1}, step[] = {1, 1, 1};
  TensorMap map;
  auto error = ((decltype(&cuTensorMapEncodeTiled))encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)base, size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error) throw std::runtime_error("cuTensorMapEncodeTiled refuses a matrix");
  return map;
}
// The box at (expert, row, col); its bytes arrive at the mbarrier.
DEV void tma_load(void* to, const TensorMap& map, uint64_t* b, int col, int row, int expert) {
  PTX("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];",
      U32(smem_addr(to)), U64(&map), U32(col), U32(row), U32(expert), U32(smem_addr(b)));
}
// ---- wgmma: a warpgroup multiplies 64 x 16 by 16 x 256, both in shared memory -------------------
DEV void wgmma_fence() { PTX("wgmma.fence.sync.aligned;"); }
DEV void wgmma_commit() { PTX("wgmma.commit_group.sync.aligned;"); }
DEV void wgmma_wait() { PTX("wgmma.wait_group.sync.aligned 0;"); }
// d[j] are 4 of a thread's 128 sums: columns 8 j + 2 (lane % 4) and the next, of row lane / 4 and
// of the row 8 below. MajorA, MajorB: 0 where the matrix lies with k along its rows, else 1.
template <int MajorA, int MajorB>
DEV void wgmma_m64n256k16(float (&d)[32][4], uint64_t a, uint64_t b) {
  PTX_SUMS("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
           "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
           "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
           "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,"
           "%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,"
           "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"
           "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"
           "%126,%127}, %128, %129, 1, 1, 1, %130, %131;",
           d, U64(a), U64(b), CONST(MajorA), CONST(MajorB));
}

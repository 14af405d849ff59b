// What both kernel files need: 16-byte vectors, numbers as floats, launch().
#pragma once
#include "launchers.h"
#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cstdint>
#include <stdexcept>
#include <cuda.h>
#include <cuda_bf16.h>
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t smem, cudaStream_t stream,
            const Args&... args) {
  if (smem > 48 << 10)                   // more than this must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
  kernel<<<grid, threads, smem, stream>>>(args...);
  check(cudaGetLastError());
}
#endif
#include "ptx.cuh"

template <class T> struct alignas(16) Vec {     // one load or store: 8 bf16 or 4 float
  static constexpr int N = 16 / sizeof(T);
  T v[N];
};
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

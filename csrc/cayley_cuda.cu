// CUDA kernels of the Cayley op: unpacking, packing and the leaf inverse. The products between them are torch's.
#include "cayley.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace ssvd {
namespace {

constexpr int kTile = 32;      // skew and unskew: tiles of 32 x 32, 8 rows at a time
constexpr int kTileRows = 8;
constexpr int kSide = 16;      // leaf: 16 x 16 threads, each holding rows y + 16 a and columns x + 16 b
constexpr int kOwn = kLeaf / kSide;
constexpr int64_t kMaxGrid = 65535;

// theta[start(i) + j] is K[i, j].
__device__ __forceinline__ int64_t start(int64_t i, int64_t k) {
  return i * (2 * k - i - 1) / 2 - i - 1;
}

template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) skew_kernel(const T* __restrict__ theta, T* __restrict__ K,
                                                                int64_t B, int64_t k) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t i0 = int64_t(blockIdx.y) * kTile, j0 = int64_t(blockIdx.x) * kTile;
  if (i0 > j0) return;
  const int64_t m = k * (k - 1) / 2;
  for (int64_t b = blockIdx.z; b < B; b += gridDim.z) {
    const T* source = theta + b * m;
    T* target = K + b * k * k;
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t i = i0 + y, j = j0 + threadIdx.x;
      tile[y][threadIdx.x] = i < j && j < k ? source[start(i, k) + j] : T(0);
    }
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int x = threadIdx.x;
      if (i0 == j0) {
        if (i0 + y < k && j0 + x < k) target[(i0 + y) * k + j0 + x] = tile[y][x] - tile[x][y];
      } else {
        if (j0 + x < k) target[(i0 + y) * k + j0 + x] = tile[y][x];
        if (j0 + y < k) target[(j0 + y) * k + i0 + x] = -tile[x][y];
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) unskew_kernel(const T* __restrict__ Z, T* __restrict__ dtheta,
                                                                  int64_t B, int64_t k) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t i0 = int64_t(blockIdx.y) * kTile, j0 = int64_t(blockIdx.x) * kTile;
  if (i0 > j0) return;
  const int64_t m = k * (k - 1) / 2;
  for (int64_t b = blockIdx.z; b < B; b += gridDim.z) {
    const T* source = Z + b * k * k;
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t j = j0 + y, i = i0 + threadIdx.x;
      if (i < k && j < k) tile[y][threadIdx.x] = source[j * k + i];
    }
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t i = i0 + y, j = j0 + threadIdx.x;
      if (i < j && j < k) dtheta[b * m + start(i, k) + j] = 2 * (tile[threadIdx.x][y] - source[i * k + j]);
    }
    __syncthreads();
  }
}

// Gauss-Jordan without pivoting on A = I + N, one matrix a block, storing A - I and at the end 2 (A^-1 - I).
// Elements stay in registers; pivot row and column travel through shared memory, in two buffers so that one barrier a
// pivot is enough. Padding with zeros is exact. In float64 for every dtype, as on the CPU.
template <class T>
__global__ void __launch_bounds__(kSide* kSide) leaf_kernel(T* __restrict__ N, int n, int64_t stride_b,
                                                            int64_t stride_row) {
  __shared__ double pivot_row[2][kLeaf], pivot_col[2][kLeaf];
  const int x = threadIdx.x, y = threadIdx.y;
  T* base = N + int64_t(blockIdx.x) * stride_b;
  double own[kOwn][kOwn];
#pragma unroll
  for (int a = 0; a < kOwn; ++a) {
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
      const int i = y + kSide * a, j = x + kSide * b;
      own[a][b] = i < n && j < n ? double(base[i * stride_row + j]) : 0.0;
    }
  }
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {  // pivot p = 16 q + s: which register holds it is known when compiling
    for (int s = 0; s < kSide && kSide * q + s < n; ++s) {
      const int buffer = s & 1;
      if (y == s) {
#pragma unroll
        for (int b = 0; b < kOwn; ++b) pivot_row[buffer][x + kSide * b] = own[q][b];
      }
      if (x == s) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) pivot_col[buffer][y + kSide * a] = own[a][q];
      }
      __syncthreads();
      const double pivot = pivot_row[buffer][kSide * q + s], inv = 1 / (1 + pivot);
      double scaled[kOwn];
#pragma unroll
      for (int b = 0; b < kOwn; ++b) scaled[b] = pivot_row[buffer][x + kSide * b] * inv;
      if (x == s) scaled[q] = inv;
#pragma unroll
      for (int a = 0; a < kOwn; ++a) {
        const double f = pivot_col[buffer][y + kSide * a];
        const bool row_p = a == q && y == s;
#pragma unroll
        for (int b = 0; b < kOwn; ++b) {
          const bool col_p = b == q && x == s;
          const double rest = col_p ? 0.0 : own[a][b];
          own[a][b] = !row_p ? rest - f * scaled[b] : col_p ? -pivot * inv : scaled[b];
        }
      }
    }
  }
#pragma unroll
  for (int a = 0; a < kOwn; ++a) {
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
      const int i = y + kSide * a, j = x + kSide * b;
      if (i < n && j < n) base[i * stride_row + j] = static_cast<T>(2 * own[a][b]);
    }
  }
}

dim3 tile_grid(int64_t B, int64_t k) {
  const unsigned tiles = static_cast<unsigned>((k + kTile - 1) / kTile);
  return {tiles, tiles, static_cast<unsigned>(B < kMaxGrid ? B : kMaxGrid)};
}

}  // namespace

template <class T>
void skew_cuda(const T* theta, T* K, int64_t B, int64_t k, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const dim3 threads(kTile, kTileRows);
  skew_kernel<<<tile_grid(B, k), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(theta, K, B, k);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void unskew_cuda(const T* Z, T* dtheta, int64_t B, int64_t k, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const dim3 threads(kTile, kTileRows);
  unskew_kernel<<<tile_grid(B, k), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(Z, dtheta, B, k);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void leaf_cuda(T* N, int64_t B, int64_t n, int64_t stride_b, int64_t stride_row, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const dim3 threads(kSide, kSide);
  leaf_kernel<<<static_cast<unsigned>(B), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      N, static_cast<int>(n), stride_b, stride_row);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template void skew_cuda(const float*, float*, int64_t, int64_t, int);
template void skew_cuda(const double*, double*, int64_t, int64_t, int);
template void unskew_cuda(const float*, float*, int64_t, int64_t, int);
template void unskew_cuda(const double*, double*, int64_t, int64_t, int);
template void leaf_cuda(float*, int64_t, int64_t, int64_t, int64_t, int);
template void leaf_cuda(double*, int64_t, int64_t, int64_t, int64_t, int);

}  // namespace ssvd

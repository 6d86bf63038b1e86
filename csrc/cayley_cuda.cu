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
constexpr int kWarp = 32, kThreads = 256;  // wide: a warp to a row
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

// failed[b, block]: whether float32 may not serve matrix b, by kTile of its columns.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) check_kernel(const T* __restrict__ theta, const T* __restrict__ E,
                                                                 int* __restrict__ failed, int64_t B, int64_t k) {
  __shared__ double sums[2][kTileRows][kTile];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t m = k * (k - 1) / 2, j = int64_t(blockIdx.x) * kTile + x;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    double square = 0, excess = 0;  // of a column of K, and of one of G = I + E over 1
    for (int64_t i = y; i < k && j < k; i += kTileRows) {
      const double e = E[(b * k + i) * k + j];
      const double t = i == j ? T(0) : theta[b * m + (i < j ? start(i, k) + j : start(j, k) + i)];
      excess += e * (i == j ? e + 2 : e);
      square += t * t;
    }
    sums[0][y][x] = square;
    sums[1][y][x] = excess;
    __syncthreads();
    if (y == 0) {
      for (int r = 1; r < kTileRows; ++r) {
        square += sums[0][r][x];
        excess += sums[1][r][x];
      }
      const int any = __any_sync(0xffffffff, !(square <= kLarge && fabs(excess) <= kNotUnit));
      if (x == 0) failed[b * gridDim.x + blockIdx.x] = any;
    }
    __syncthreads();
  }
}

// E anew where a part of it failed: Gauss-Jordan without pivoting on A = I + K in float64, A stored as E + low. Of few
// matrices, so one block does a whole one, and needs no memory of its own.
template <class T>
__global__ void __launch_bounds__(kThreads) wide_kernel(const T* __restrict__ theta, T* E, T* low,
                                                        const int* __restrict__ failed, int blocks, int64_t k) {
  const int64_t b = blockIdx.x;
  int redo = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) redo |= failed[b * blocks + i];
  if (!__syncthreads_or(redo)) return;
  theta += b * (k * (k - 1) / 2);
  E += b * k * k;
  low += b * k * k;
  const auto load = [=](int64_t place) { return double(E[place]) + double(low[place]); };
  const auto store = [=](int64_t place, double value) {
    const T high = static_cast<T>(value);
    E[place] = high;
    low[place] = static_cast<T>(value - double(high));
  };
  for (int64_t place = threadIdx.x; place < k * k; place += kThreads) {
    const int64_t i = place / k, j = place % k;
    store(place, i == j ? 1 : i < j ? theta[start(i, k) + j] : -theta[start(j, k) + i]);
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t p = 0; p < k; ++p) {
    const double inv = 1 / load(p * k + p);
    for (int64_t i = warp; i < k; i += kThreads / kWarp) {
      if (i == p) continue;
      const double f = load(i * k + p) * inv;
      __syncwarp();  // every lane has read it
      for (int64_t j = lane; j < k; j += kWarp) {
        store(i * k + j, j == p ? -f : load(i * k + j) - f * load(p * k + j));
      }
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < k; j += kThreads) store(p * k + j, j == p ? inv : load(p * k + j) * inv);
    __syncthreads();
  }
  for (int64_t place = threadIdx.x; place < k * k; place += kThreads) {
    store(place, 2 * (load(place) - (place / k == place % k)));
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

int64_t check_blocks(int64_t k) { return (k + kTile - 1) / kTile; }

template <class T>
void check_cuda(const T* theta, const T* E, int* failed, int64_t B, int64_t k, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const dim3 threads(kTile, kTileRows);
  const dim3 grid(static_cast<unsigned>(check_blocks(k)), static_cast<unsigned>(B < kMaxGrid ? B : kMaxGrid));
  check_kernel<<<grid, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(theta, E, failed, B, k);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void wide_cuda(const T* theta, T* E, T* low, const int* failed, int64_t B, int64_t k, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  wide_kernel<<<static_cast<unsigned>(B), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      theta, E, low, failed, static_cast<int>(check_blocks(k)), k);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template void skew_cuda(const float*, float*, int64_t, int64_t, int);
template void skew_cuda(const double*, double*, int64_t, int64_t, int);
template void unskew_cuda(const float*, float*, int64_t, int64_t, int);
template void unskew_cuda(const double*, double*, int64_t, int64_t, int);
template void leaf_cuda(float*, int64_t, int64_t, int64_t, int64_t, int);
template void leaf_cuda(double*, int64_t, int64_t, int64_t, int64_t, int);
template void check_cuda(const float*, const float*, int*, int64_t, int64_t, int);
template void check_cuda(const double*, const double*, int*, int64_t, int64_t, int);
template void wide_cuda(const float*, float*, float*, const int*, int64_t, int64_t, int);
template void wide_cuda(const double*, double*, double*, const int*, int64_t, int64_t, int);

}  // namespace ssvd

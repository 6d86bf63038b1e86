// Cayley map of packed skew-symmetric matrices: the algebra, written once for CPU and CUDA.
//
//   theta (B, m), m = k(k-1)/2, packs K: K[i, j] = +theta for i < j and K[j, i] = -theta.
//   E = (I - K)(I + K)^-1 - I = 2 [(I + K)^-1 - I],  carried through the inversion so that small K loses nothing.
//
// Nothing of torch is included here, so that nvcc needs no ATen headers.
#pragma once

#include <cstdint>

namespace ssvd {

// Largest block that is inverted by a kernel of its own; larger ones are split.
constexpr int64_t kLeaf = 64;

// The rounding errors of `inverse_delta_` grow with ||K||. It is not tried from this ||column of K||^2 on, which is 29
// to 51 if K is random, k > kLeaf, ||K||_2 = 10, ...
constexpr double kLarge = 50;
// ... and its E is not used from this | ||column of G||^2 - 1 | on, which is then about 1e-6.
constexpr double kNotUnit = 1.5e-6;

// First block of a split: a multiple of kLeaf, about n / 2.
inline int64_t split(int64_t n) {
  return kLeaf * (((n + kLeaf - 1) / kLeaf) / 2);
}

// A backend's matrix type M (row-major, one matrix or a batch) comes with
//   rows(M) -> n,  block(M, row, col, rows, cols) -> M,
//   leaf_(M): N (n <= kLeaf) becomes 2 [(I + N)^-1 - I],
//   multiply_add(out, beta, C, alpha, A, B): out = beta C + alpha A B; out is C or overlaps nothing.

// N (n, n) becomes 2 [(I + N)^-1 - I], for N whose symmetric part is positive semidefinite: every pivot block and every
// Schur complement then has a symmetric part >= I, so no pivoting is needed. The products cost 2 n^3 FLOPs.
// `scratch` (n, n) is cut as N is; its off-diagonal blocks hold L and R.
template <class M>
void inverse_delta_(const M& N, const M& scratch) {
  const int64_t n = rows(N);
  if (n <= kLeaf) {
    leaf_(N);
    return;
  }
  const int64_t h = split(n), r = n - h;
  const M N11 = block(N, 0, 0, h, h), N12 = block(N, 0, h, h, r);
  const M N21 = block(N, h, 0, r, h), N22 = block(N, h, h, r, r);
  const M R = block(scratch, 0, h, h, r), L = block(scratch, h, 0, r, h);
  inverse_delta_(N11, block(scratch, 0, 0, h, h));  // E11
  multiply_add(L, 1, N21, 0.5, N21, N11);           // L = N21 (I + N11)^-1
  multiply_add(R, 1, N12, 0.5, N11, N12);           // R = (I + N11)^-1 N12
  multiply_add(N22, 1, N22, -1, L, N12);            // Schur complement less I
  inverse_delta_(N22, block(scratch, h, h, r, r));  // E22
  multiply_add(N12, -2, R, -1, R, N22);             // E12 = -2 R (I + S)^-1
  multiply_add(N21, -2, L, -1, N22, L);             // E21 = -2 (I + S)^-1 L
  multiply_add(N11, 1, N11, -1, N12, L);            // E11 = 2 F11 - E12 L
}

// CPU: theta (B, m), E, grad (B, k, k), dtheta (B, m), all contiguous; scratch holds `scratch_matrices` (k, k) each.
int64_t scratch_matrices_forward(int64_t B);
int64_t scratch_matrices_backward(int64_t B);
template <class T>
void cayley_delta_cpu(const T* theta, T* E, T* scratch, int64_t B, int64_t k);
template <class T>
void cayley_delta_backward_cpu(const T* grad, const T* E, T* dtheta, T* scratch, int64_t B, int64_t k);

// CUDA launchers, on the current stream of `device`.
template <class T>  // theta (B, m) -> K (B, k, k)
void skew_cuda(const T* theta, T* K, int64_t B, int64_t k, int device);
template <class T>  // Z (B, k, k) -> dtheta (B, m) = 2 (Z^T - Z)
void unskew_cuda(const T* Z, T* dtheta, int64_t B, int64_t k, int device);
template <class T>  // N (B, n, n), n <= kLeaf, element [b, i, j] at b * stride_b + i * stride_row + j
void leaf_cuda(T* N, int64_t B, int64_t n, int64_t stride_b, int64_t stride_row, int device);
template <class T>  // failed (B, check_blocks(k)): nonzero where K of theta (B, m) is large, or E (B, k, k) not right
void check_cuda(const T* theta, const T* E, int* failed, int64_t B, int64_t k, int device);
template <class T>  // E anew for those, in float64; `low` (B, k, k) is overwritten
void wide_cuda(const T* theta, T* E, T* low, const int* failed, int64_t B, int64_t k, int device);
int64_t check_blocks(int64_t k);

}  // namespace ssvd

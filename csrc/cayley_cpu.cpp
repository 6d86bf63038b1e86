// CPU: the batch is spread over the threads, each matrix uses torch's BLAS with one thread; matrices left over are done
// one after the other with all threads inside the products.
#include "cayley.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__GNUC__) && !defined(SSVD_NO_DIRECT_BLAS)
// torch's own BLAS, directly where it is visible: at::addmm rounds float32 to bf16 where the user allows it.
// The integers are 64 bits wide on purpose: a BLAS that takes 32 bits reads the low half of each.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int64_t*, const int64_t*, const int64_t*,
                                  const float*, const float*, const int64_t*, const float*, const int64_t*,
                                  const float*, float*, const int64_t*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int64_t*, const int64_t*, const int64_t*,
                                  const double*, const double*, const int64_t*, const double*, const int64_t*,
                                  const double*, double*, const int64_t*);
}
#define SSVD_BLAS(name) name
#else
#define SSVD_BLAS(name) nullptr
#endif

// One build for every x86-64 CPU, the widest vectors chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SSVD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SSVD_CLONES
#endif

namespace ssvd {
namespace {

constexpr int64_t kTile = 16;  // skew and unskew: 16 rows or columns of one cache line each

template <class T>
struct Matrix {
  T* data;
  int64_t n_rows, n_cols, ld;
  bool trans = false;  // data holds the transpose
};

template <class T>
int64_t rows(const Matrix<T>& a) {
  return a.n_rows;
}

template <class T>
Matrix<T> block(const Matrix<T>& a, int64_t row, int64_t col, int64_t n_rows, int64_t n_cols) {
  return {a.data + row * a.ld + col, n_rows, n_cols, a.ld};
}

template <class T>
using Gemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const T*, const T*,
                      const int64_t*, const T*, const int64_t*, const T*, T*, const int64_t*);
Gemm<float> blas(float) { return SSVD_BLAS(sgemm_); }
Gemm<double> blas(double) { return SSVD_BLAS(dgemm_); }

template <class T>
at::Tensor tensor(const Matrix<T>& a) {
  return at::from_blob(a.data, {a.n_rows, a.n_cols}, {a.trans ? 1 : a.ld, a.trans ? a.ld : 1},
                       at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

// out = beta out + alpha a b
template <class T>
void multiply(const Matrix<T>& out, double beta, double alpha, const Matrix<T>& a, const Matrix<T>& b) {
  if (const Gemm<T> gemm = blas(T())) {  // column-major: out^T = b^T a^T
    const T scale_out = static_cast<T>(beta), scale = static_cast<T>(alpha);
    gemm(b.trans ? "T" : "N", a.trans ? "T" : "N", &out.n_cols, &out.n_rows, &a.n_cols, &scale, b.data, &b.ld, a.data,
         &a.ld, &scale_out, out.data, &out.ld);
  } else {
    tensor(out).addmm_(tensor(a), tensor(b), beta, alpha);
  }
}

template <class T>
void multiply_add(const Matrix<T>& out, double beta, const Matrix<T>& c, double alpha, const Matrix<T>& a,
                  const Matrix<T>& b) {
  if (out.data == c.data) return multiply(out, beta, alpha, a, b);
  multiply(out, 0, alpha, a, b);
  // C is added last: a BLAS that accumulates the products onto C rounds each of them to C's last digit.
  for (int64_t i = 0; i < out.n_rows; ++i) {
    T* target = out.data + i * out.ld;
    const T* source = c.data + i * c.ld;
    for (int64_t j = 0; j < out.n_cols; ++j) target[j] += static_cast<T>(beta) * source[j];
  }
}

// Gauss-Jordan without pivoting on A = N + one I, storing N before the sweeps and A^-1 - one I after: with one = 1
// nothing is lost of a small N. Rows are kLeaf apart. In float64 for every dtype: in float32 each of the 64 sweeps would
// round all elements, which for small N is several times the error of a solve.
SSVD_CLONES void sweep(double* __restrict__ a, int64_t n, int one) {
  alignas(64) double pivot_row[kLeaf];
  for (int64_t p = 0; p < n; ++p) {
    double* row_p = a + p * kLeaf;
    const double inv = 1 / (one + row_p[p]);
    const double diagonal = one ? -row_p[p] * inv : inv;
    for (int64_t j = 0; j < n; ++j) pivot_row[j] = row_p[j] * inv;
    for (int64_t i = 0; i < n; ++i) {
      double* row = a + i * kLeaf;
      const double f = row[p];
      for (int64_t j = 0; j < n; ++j) row[j] -= f * pivot_row[j];
      row[p] = -f * inv;
    }
    std::copy_n(pivot_row, n, row_p);
    row_p[p] = diagonal;
  }
}

template <class T>
void leaf_(const Matrix<T>& N) {
  alignas(64) double a[kLeaf * kLeaf];
  const int64_t n = N.n_rows;
  for (int64_t i = 0; i < n; ++i) std::copy_n(N.data + i * N.ld, n, a + i * kLeaf);
  sweep(a, n, 1);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) N.data[i * N.ld + j] = static_cast<T>(2 * a[i * kLeaf + j]);
  }
}

// theta[start(i) + j] is K[i, j].
int64_t start(int64_t i, int64_t k) {
  return i * (2 * k - i - 1) / 2 - i - 1;
}

// Calls f(i, j, rows, cols) for the tiles on and above the diagonal; rows of tiles go to the threads.
template <class F>
void for_each_upper_tile(int64_t k, const F& f) {
  at::parallel_for(0, (k + kTile - 1) / kTile, std::max<int64_t>(1, 32768 / (kTile * k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kTile; i < std::min(k, end * kTile); i += kTile) {
      for (int64_t j = i; j < k; j += kTile) f(i, j, std::min(kTile, k - i), std::min(kTile, k - j));
    }
  });
}

template <class T>
void skew(const T* theta, T* K, int64_t k) {
  for_each_upper_tile(k, [=](int64_t i0, int64_t j0, int64_t n_rows, int64_t n_cols) {
    T tile[kTile][kTile];
    for (int64_t i = 0; i < n_rows; ++i) {
      const T* source = theta + start(i0 + i, k) + j0;
      T* target = K + (i0 + i) * k + j0;
      const int64_t first = i0 == j0 ? i + 1 : 0;  // on the diagonal only the upper half is stored
      for (int64_t j = first; j < n_cols; ++j) tile[i][j] = target[j] = source[j];
      if (i0 == j0) target[i] = 0;
    }
    for (int64_t j = 0; j < n_cols; ++j) {
      const int64_t last = i0 == j0 ? j : n_rows;
      for (int64_t i = 0; i < last; ++i) K[(j0 + j) * k + i0 + i] = -tile[i][j];
    }
  });
}

template <class T>
void unskew(const T* Z, T* dtheta, int64_t k) {
  for_each_upper_tile(k, [=](int64_t i0, int64_t j0, int64_t n_rows, int64_t n_cols) {
    T tile[kTile][kTile];
    for (int64_t j = 0; j < n_cols; ++j) {
      std::copy_n(Z + (j0 + j) * k + i0, n_rows, tile[j]);
    }
    for (int64_t i = 0; i < n_rows; ++i) {
      const T* source = Z + (i0 + i) * k + j0;
      T* target = dtheta + start(i0 + i, k) + j0;
      for (int64_t j = i0 == j0 ? i + 1 : 0; j < n_cols; ++j) target[j] = 2 * (tile[j][i] - source[j]);
    }
  });
}

// The largest | ||g||^2 - 1 | of a column g of I + E.
template <class T>
SSVD_CLONES double excess(const T* E, int64_t k) {
  std::vector<double> squares(k);
  for (int64_t i = 0; i < k; ++i) {
    const T* row = E + i * k;
    for (int64_t j = 0; j < k; ++j) squares[j] += double(row[j]) * row[j];
  }
  double largest = 0;
  for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::abs(squares[j] + 2 * double(E[j * k + j])));
  return largest;
}

// K becomes E by block Gauss-Jordan in float64 on A = I + K: of blocks of kLeaf rows alone the inverse is a factor in
// what follows. Right for large K, where `inverse_delta_` is not, and slower.
template <class T>
void gauss_jordan_(T* K, int64_t k) {
  alignas(64) double pivot[kLeaf * kLeaf];
  std::vector<double> values(K, K + k * k), column(k * kLeaf), row(kLeaf * k);
  const Matrix<double> A{values.data(), k, k, k};
  for (int64_t i = 0; i < k; ++i) A.data[i * k + i] += 1;
  for (int64_t p = 0; p < k; p += kLeaf) {
    const int64_t b = std::min(kLeaf, k - p);
    const Matrix<double> P{pivot, b, b, kLeaf}, C{column.data(), k, b, b}, R{row.data(), b, k, k};
    for (int64_t i = 0; i < b; ++i) std::copy_n(A.data + (p + i) * k + p, b, pivot + i * kLeaf);
    sweep(pivot, b, 0);
    multiply(R, 0, 1, P, block(A, p, 0, b, k));
    for (int64_t i = 0; i < b; ++i) std::copy_n(pivot + i * kLeaf, b, R.data + i * k + p);
    for (int64_t i = 0; i < k; ++i) {
      std::copy_n(A.data + i * k + p, b, C.data + i * b);
      std::fill_n(A.data + i * k + p, b, 0.0);
    }
    multiply(A, 1, -1, C, R);
    std::copy_n(R.data, b * k, A.data + p * k);
  }
  for (int64_t i = 0; i < k; ++i) A.data[i * k + i] -= 1;
  std::transform(values.begin(), values.end(), K, [](double x) { return static_cast<T>(2 * x); });
}

// Z = B^T dE B^T, B = I + E/2. B's diagonal is multiplied apart from the rest: sums that begin with I, or cancel it for
// large K, round more.
template <class T>
void backward(const T* grad, const T* E, T* rest, T* X, T* Z, int64_t k) {
  const Matrix<T> left{rest, k, k, k, true}, half{X, k, k, k}, full{Z, k, k, k};
  std::vector<T> own(k);
  std::copy_n(E, k * k, rest);
  for (int64_t i = 0; i < k; ++i) {
    own[i] = 1 + rest[i * k + i] / 2;
    rest[i * k + i] = 0;
  }
  multiply(half, 0, 0.5, Matrix<T>{const_cast<T*>(grad), k, k, k}, left);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) X[i * k + j] += grad[i * k + j] * own[j];
  }
  multiply(full, 0, 0.5, left, half);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) Z[i * k + j] += own[i] * X[i * k + j];
  }
}

// Matrices of a batch that are left to be done one by one, because spreading them would idle most threads.
int64_t left_over(int64_t B) {
  const int64_t threads = at::get_num_threads(), rest = B % threads;
  return 2 * rest > threads || at::in_parallel_region() ? 0 : rest;
}

// f(index, slot): slots number the scratch spaces in use at once.
template <class F>
void for_each_matrix(int64_t B, const F& f) {
  const int64_t spread = B - left_over(B);
  at::parallel_for(0, spread, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, at::get_thread_num());
  });
  for (int64_t b = spread; b < B; ++b) f(b, 0);
}

int64_t slots(int64_t B) {
  return std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(B, 1));
}

}  // namespace

int64_t scratch_matrices_forward(int64_t B) { return slots(B); }
int64_t scratch_matrices_backward(int64_t B) { return 3 * slots(B); }

template <class T>
void cayley_delta_cpu(const T* theta, T* E, T* scratch, int64_t B, int64_t k) {
  const int64_t m = k * (k - 1) / 2;
  for_each_matrix(B, [=](int64_t b, int64_t slot) {
    T* out = E + b * k * k;
    skew(theta + b * m, out, k);
    if (k <= kLeaf || excess(out, k) <= kLarge) {
      inverse_delta_(Matrix<T>{out, k, k, k}, Matrix<T>{scratch + slot * k * k, k, k, k});
      if (k <= kLeaf || excess(out, k) <= kNotUnit) return;
      skew(theta + b * m, out, k);
    }
    gauss_jordan_(out, k);
  });
}

template <class T>
void cayley_delta_backward_cpu(const T* grad, const T* E, T* dtheta, T* scratch, int64_t B, int64_t k) {
  const int64_t m = k * (k - 1) / 2;
  for_each_matrix(B, [=](int64_t b, int64_t slot) {
    T *rest = scratch + 3 * slot * k * k, *X = rest + k * k, *Z = X + k * k;
    backward(grad + b * k * k, E + b * k * k, rest, X, Z, k);
    unskew(Z, dtheta + b * m, k);
  });
}

template void cayley_delta_cpu(const float*, float*, float*, int64_t, int64_t);
template void cayley_delta_cpu(const double*, double*, double*, int64_t, int64_t);
template void cayley_delta_backward_cpu(const float*, const float*, float*, float*, int64_t, int64_t);
template void cayley_delta_backward_cpu(const double*, const double*, double*, double*, int64_t, int64_t);

}  // namespace ssvd

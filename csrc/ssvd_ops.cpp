// Operators ssvd_kernels::cayley_delta and cayley_delta_backward (schemas, checks, CPU and CUDA entries), module _C.
#include "cayley.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

namespace ssvd {
namespace {

using at::Tensor;

constexpr int64_t kMaxRank = 1 << 20;  // far beyond any use; keeps k * k from overflowing

void check_dtype(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name, " has dtype ",
                   t.scalar_type(), "; allowed are float32 and float64");
}

void check_theta(const Tensor& theta, int64_t k) {
  check_dtype("theta", theta);
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxRank, "k is ", k, "; it must be at least 1 and at most ", kMaxRank);
  TORCH_CHECK_VALUE(theta.dim() == 2, "theta has shape ", theta.sizes(), "; it must be (B, m), m = k(k-1)/2");
  const int64_t m = k * (k - 1) / 2;
  TORCH_CHECK_VALUE(theta.size(1) == m, "theta has shape ", theta.sizes(), "; for k = ", k, " it must be (B, m), m = ",
                    m, " = k(k-1)/2");
}

void check_grad(const Tensor& grad, const Tensor& E) {
  check_dtype("E", E);
  TORCH_CHECK_VALUE(E.dim() == 3 && E.size(1) == E.size(2) && E.size(1) >= 1, "E has shape ", E.sizes(),
                    "; it must be (B, k, k), k >= 1");
  TORCH_CHECK_VALUE(grad.sizes() == E.sizes(), "grad has shape ", grad.sizes(), "; it must be E's, ", E.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == E.scalar_type(), "grad has dtype ", grad.scalar_type(), "; it must be E's, ",
                   E.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == E.device(), "grad is on ", grad.device(), "; it must be on E's device, ",
                    E.device());
}

Tensor cayley_delta_cpu_op(const Tensor& theta, int64_t k) {
  check_theta(theta, k);
  const int64_t B = theta.size(0);
  if (theta.numel() == 0) return at::zeros({B, k, k}, theta.options());  // k = 1, or an empty batch
  const Tensor source = theta.contiguous();
  const Tensor E = at::empty({B, k, k}, theta.options());
  const Tensor scratch = at::empty({scratch_matrices_forward(B), k, k}, theta.options());
  AT_DISPATCH_FLOATING_TYPES(theta.scalar_type(), "cayley_delta", [&] {
    cayley_delta_cpu(source.const_data_ptr<scalar_t>(), E.mutable_data_ptr<scalar_t>(),
                     scratch.mutable_data_ptr<scalar_t>(), B, k);
  });
  return E;
}

Tensor cayley_delta_backward_cpu_op(const Tensor& grad, const Tensor& E) {
  check_grad(grad, E);
  const int64_t B = E.size(0), k = E.size(1);
  const Tensor dtheta = at::empty({B, k * (k - 1) / 2}, E.options());
  if (dtheta.numel() == 0) return dtheta;
  const Tensor dE = grad.contiguous(), delta = E.contiguous();
  const Tensor scratch = at::empty({scratch_matrices_backward(B), k, k}, E.options());
  AT_DISPATCH_FLOATING_TYPES(E.scalar_type(), "cayley_delta_backward", [&] {
    cayley_delta_backward_cpu(dE.const_data_ptr<scalar_t>(), delta.const_data_ptr<scalar_t>(),
                              dtheta.mutable_data_ptr<scalar_t>(), scratch.mutable_data_ptr<scalar_t>(), B, k);
  });
  return dtheta;
}

TORCH_LIBRARY(ssvd_kernels, m) {
  m.def("cayley_delta(Tensor theta, int k) -> Tensor");
  m.def("cayley_delta_backward(Tensor grad, Tensor E) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssvd_kernels, CPU, m) {
  m.impl("cayley_delta", cayley_delta_cpu_op);
  m.impl("cayley_delta_backward", cayley_delta_backward_cpu_op);
}

#ifdef SSVD_WITH_CUDA

// A batch of blocks (B, n_rows, n_cols) of contiguous matrices.
struct Batch {
  Tensor t;
};

int64_t rows(const Batch& a) { return a.t.size(1); }

Batch block(const Batch& a, int64_t row, int64_t col, int64_t n_rows, int64_t n_cols) {
  return {a.t.narrow(1, row, n_rows).narrow(2, col, n_cols)};
}

void leaf_(const Batch& N) {
  AT_DISPATCH_FLOATING_TYPES(N.t.scalar_type(), "cayley_delta", [&] {
    leaf_cuda(N.t.mutable_data_ptr<scalar_t>(), N.t.size(0), N.t.size(1), N.t.stride(0), N.t.stride(1),
              N.t.device().index());
  });
}

void multiply_add(const Batch& out, double beta, const Batch& c, double alpha, const Batch& a, const Batch& b) {
  Tensor target = out.t;
  if (target.is_same(c.t)) {
    target.baddbmm_(a.t, b.t, beta, alpha);
  } else {
    at::baddbmm_out(target, c.t, a.t, b.t, beta, alpha);
  }
}

Tensor cayley_delta_cuda_op(const Tensor& theta, int64_t k) {
  check_theta(theta, k);
  const int64_t B = theta.size(0);
  if (theta.numel() == 0) return at::zeros({B, k, k}, theta.options());
  const at::NoTF32Guard full_precision;
  const Tensor source = theta.contiguous();
  const Tensor E = at::empty({B, k, k}, theta.options());
  AT_DISPATCH_FLOATING_TYPES(theta.scalar_type(), "cayley_delta", [&] {
    skew_cuda(source.const_data_ptr<scalar_t>(), E.mutable_data_ptr<scalar_t>(), B, k, theta.device().index());
  });
  const Tensor scratch = k > kLeaf ? at::empty_like(E) : E;
  inverse_delta_(Batch{E}, Batch{scratch});
  if (k <= kLeaf) return E;
  const Tensor failed = at::empty({B, check_blocks(k)}, theta.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(theta.scalar_type(), "cayley_delta", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    check_cuda(from, E.const_data_ptr<scalar_t>(), failed.mutable_data_ptr<int>(), B, k, theta.device().index());
    wide_cuda(from, E.mutable_data_ptr<scalar_t>(), scratch.mutable_data_ptr<scalar_t>(), failed.const_data_ptr<int>(),
              B, k, theta.device().index());
  });
  return E;
}

Tensor cayley_delta_backward_cuda_op(const Tensor& grad, const Tensor& E) {
  check_grad(grad, E);
  const int64_t B = E.size(0), k = E.size(1);
  const Tensor dtheta = at::empty({B, k * (k - 1) / 2}, E.options());
  if (dtheta.numel() == 0) return dtheta;
  const at::NoTF32Guard full_precision;
  // B = I + E/2, its diagonal apart from the rest: see cayley_cpu.cpp
  const Tensor rest = E.clone(at::MemoryFormat::Contiguous), own = E.diagonal(0, 1, 2).div(2).add(1);
  rest.diagonal(0, 1, 2).zero_();
  const Tensor right = rest.transpose(1, 2);
  const Tensor X = at::baddbmm(grad.mul(own.unsqueeze(1)), grad, right, 1, 0.5);
  const Tensor Z = at::baddbmm(X.mul(own.unsqueeze(2)), right, X, 1, 0.5);
  AT_DISPATCH_FLOATING_TYPES(E.scalar_type(), "cayley_delta_backward", [&] {
    unskew_cuda(Z.const_data_ptr<scalar_t>(), dtheta.mutable_data_ptr<scalar_t>(), B, k, E.device().index());
  });
  return dtheta;
}

TORCH_LIBRARY_IMPL(ssvd_kernels, CUDA, m) {
  m.impl("cayley_delta", cayley_delta_cuda_op);
  m.impl("cayley_delta_backward", cayley_delta_backward_cuda_op);
}

#endif  // SSVD_WITH_CUDA

}  // namespace
}  // namespace ssvd

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#ifdef SSVD_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

// RMSNorm with the residual sum: sum = x + residual, normed = sum * rstd * weight, rstd = (mean(sum^2) +
// eps)^-1/2.
//
// Layout: (rows, E) contiguous; parallel axis: rows (the caller's). Forward reads x and residual and writes
// sum and normed once (a row stays in the first-level cache between the two loops); backward likewise. Under
// 10 operations for each element.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using namespace vimamba;

template <class X, class R, class Y>
void norm_forward_rows(const Norm& norm, int64_t begin, int64_t end) {
  const int64_t E = norm.dim;
  for (int64_t m = begin; m < end; ++m) {
    const X* x = (const X*)norm.x + m * E;
    const R* residual = norm.residual ? (const R*)norm.residual + m * E : nullptr;
    float* total = norm.sum + m * E;
    Y* normed = (Y*)norm.normed + m * E;
    vf squares = {};
    for (int64_t e = 0; e < E; e += W) {
      const int lanes = E - e < W ? (int)(E - e) : W;
      vf value = load(x + e, lanes);
      if (residual) value += load(residual + e, lanes);
      store(total + e, value, lanes);
      squares += value * value;
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / (float)E + norm.eps);
    norm.rstd[m] = rstd;
    for (int64_t e = 0; e < E; e += W) {
      const int lanes = E - e < W ? (int)(E - e) : W;
      store(normed + e, load(total + e, lanes) * rstd * load(norm.weight + e, lanes), lanes);
    }
  }
}

template <class X, class R>
void norm_forward_residual(const Norm& norm, int64_t begin, int64_t end) {
  if (norm.normed_bf16)
    norm_forward_rows<X, R, bf16>(norm, begin, end);
  else
    norm_forward_rows<X, R, float>(norm, begin, end);
}

void norm_forward(const Norm& norm, int64_t begin, int64_t end) {
  if (norm.x_bf16 && norm.residual_bf16) return norm_forward_residual<bf16, bf16>(norm, begin, end);
  if (norm.x_bf16) return norm_forward_residual<bf16, float>(norm, begin, end);
  if (norm.residual_bf16) return norm_forward_residual<float, bf16>(norm, begin, end);
  norm_forward_residual<float, float>(norm, begin, end);
}

// dsum = rstd (dnormed w - s mean(dnormed w s)) + dresidual with s = sum * rstd; dweight (E,) gains dnormed
// s.
template <class Y>
void norm_backward_rows(const NormGradients& grad, int64_t begin, int64_t end, float* dweight) {
  const int64_t E = grad.dim;
  for (int64_t m = begin; m < end; ++m) {
    const Y* dnormed = (const Y*)grad.dnormed + m * E;
    const float* total = grad.sum + m * E;
    const float rstd = grad.rstd[m];
    vf products = {};
    for (int64_t e = 0; e < E; e += W) {
      const int lanes = E - e < W ? (int)(E - e) : W;
      const vf dy_s = load(dnormed + e, lanes) * load(total + e, lanes) * rstd;
      store(dweight + e, load(dweight + e, lanes) + dy_s, lanes);
      products += dy_s * load(grad.weight + e, lanes);
    }
    const float mean = sum(products) / (float)E;
    for (int64_t e = 0; e < E; e += W) {
      const int lanes = E - e < W ? (int)(E - e) : W;
      const vf s = load(total + e, lanes) * rstd;
      vf dsum = (load(dnormed + e, lanes) * load(grad.weight + e, lanes) - s * mean) * rstd;
      if (grad.dresidual) dsum += load(grad.dresidual + m * E + e, lanes);
      store(grad.dsum + m * E + e, dsum, lanes);
    }
  }
}

void norm_backward(const NormGradients& grad, int64_t begin, int64_t end, float* dweight) {
  if (grad.dnormed_bf16)
    norm_backward_rows<bf16>(grad, begin, end, dweight);
  else
    norm_backward_rows<float>(grad, begin, end, dweight);
}

}  // namespace

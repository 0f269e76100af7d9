// spu::attention: the torch side. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include <algorithm>

#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

// The kernels want the last dimension contiguous and take any strides of the others.
Tensor with_dense_heads(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

HeadsView view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Checks q [B, T, H, D], k and v [B, S, G, D] and fills what both directions share; the views point into the tensors.
Attention describe(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  for (const Tensor* t : {&q, &k, &v}) {
    checks::expect_cpu(op, "an operand", *t);
    if (t->dim() != 4) {
      checks::fail("spu::", op, ": q, k and v must be [batch, tokens, heads, head_dim], got ", checks::shape(*t));
    }
  }
  checks::expect_same_dtype(op, "q", q, "k", k);
  checks::expect_same_dtype(op, "q", q, "v", v);
  checks::expect_same_shape(op, "k", k, "v", v);
  const bool fits = q.size(0) == k.size(0) && q.size(3) == k.size(3) && k.size(2) > 0 &&
                    (k.size(1) > 0 || q.size(1) == 0) && q.size(2) % k.size(2) == 0 &&
                    (!causal || q.size(1) == k.size(1));
  if (!fits || !(scale > 0)) {
    checks::fail("spu::", op, ": q ", checks::shape(q), " does not fit k ", checks::shape(k), " with scale ", scale,
                 causal ? " and the causal mask" : "");
  }
  Attention a = {};
  a.type = storage_type(op, "q", q);
  a.queries = q.size(1), a.keys = k.size(1), a.heads = q.size(2), a.kv_heads = k.size(2), a.head_dim = q.size(3);
  a.scale = static_cast<float>(scale), a.causal = causal;
  a.q = view_of(q), a.k = view_of(k), a.v = view_of(v);
  a.query_chunks = 1;
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, bool causal) {
  for (Tensor* t : {&q, &k, &v}) {
    if (t->dim() == 4) *t = with_dense_heads(*t);
  }
  Attention a = describe("attention", q, k, v, scale, causal);
  Tensor out = empty_as(q), lse = new_empty(q, {q.size(0), a.heads, a.queries}, ScalarType::Float);
  a.out = out.mutable_data_ptr(), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t heads = q.size(0) * a.heads;
  if (lse.numel() == 0) return {out, lse};
  // A head's panels are shared out only where there are fewer heads than threads: each task packs its keys itself.
  a.query_chunks = std::max<int64_t>(1, threads() / heads);
  const KernelTable& table = kernels();
  for_ranges(heads * a.query_chunks, 1, [&](int64_t begin, int64_t end) { table.attention(a, begin, end); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      double scale, bool causal) {
  const char* op = "attention_backward";
  for (Tensor* t : {&dout, &q, &k, &v, &out}) {
    if (t->dim() == 4) *t = with_dense_heads(*t);
  }
  Attention a = describe(op, q, k, v, scale, causal);
  for (const Tensor* t : {&dout, &out}) {
    checks::expect_cpu(op, "out and its gradient", *t);
    checks::expect_same_shape(op, "out or its gradient", *t, "q", q);
    checks::expect_same_dtype(op, "out or its gradient", *t, "q", q);
  }
  checks::expect_cpu(op, "lse", lse);
  checks::expect_dtype(op, "lse", lse, ScalarType::Float);
  if (!lse.is_contiguous() || lse.numel() != q.size(0) * a.heads * a.queries) {
    checks::fail("spu::", op, ": lse must be contiguous [batch, heads, tokens], got ", checks::shape(lse));
  }
  Tensor dq = empty_as(q), dk = empty_as(k), dv = empty_as(k);
  a.dout = view_of(dout), a.saved_out = view_of(out);
  a.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  const KernelTable& table = kernels();
  if (k.numel() > 0) {
    for_ranges(q.size(0) * a.kv_heads, 1, [&](int64_t begin, int64_t end) { table.attention_backward(a, begin, end); });
  }
  return {dq, dk, dv};
}

}  // namespace spu::cpu

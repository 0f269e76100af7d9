// spu::embedding_dw_ and spu::rotary: the torch side. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include <algorithm>
#include <cstring>

#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

// Which rows of the gradient belong to each row of the weight that has any: those of the i-th, `targets[i]`, are
// sources[starts[i]] to sources[starts[i + 1]], in their order.
struct Uses {
  std::vector<int64_t> targets, starts;
  std::vector<uint32_t> sources;
};

Uses uses_of(const char* op, const Tensor& ids, int64_t entries, int64_t padding_idx) {
  checks::expect_cpu(op, "ids", ids);
  if (ids.scalar_type() != ScalarType::Long) checks::fail("spu::", op, ": ids must be int64");
  if (ids.numel() >= int64_t{1} << 32 || entries >= int64_t{1} << 32) {
    checks::fail("spu::", op, ": ", ids.numel(), " ids of ", entries, " entries are more than 2^32");
  }
  const Tensor flat = dense(ids);
  const int64_t* id = static_cast<const int64_t*>(flat.const_data_ptr());
  std::vector<uint64_t> keys;
  keys.reserve(static_cast<size_t>(ids.numel()));
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (id[i] < 0 || id[i] >= entries) {
      checks::fail("spu::", op, ": ids has ", id[i], ", which is not in [0, ", entries, ")");
    }
    if (id[i] != padding_idx) keys.push_back(static_cast<uint64_t>(id[i]) << 32 | static_cast<uint64_t>(i));
  }
  std::sort(keys.begin(), keys.end());
  Uses uses;
  uses.sources.reserve(keys.size());
  for (const uint64_t key : keys) {
    const int64_t target = static_cast<int64_t>(key >> 32);
    if (uses.targets.empty() || uses.targets.back() != target) {
      uses.targets.push_back(target);
      uses.starts.push_back(static_cast<int64_t>(uses.sources.size()));
    }
    uses.sources.push_back(static_cast<uint32_t>(key));
  }
  uses.starts.push_back(static_cast<int64_t>(uses.sources.size()));
  return uses;
}

// Zeroes rows [begin, end) of out but for the targets.
void clear_others(const Uses& uses, float* out, int64_t cols, int64_t begin, int64_t end) {
  auto next = std::lower_bound(uses.targets.begin(), uses.targets.end(), begin);
  while (begin < end) {
    const int64_t stop = next == uses.targets.end() ? end : std::min(end, *next);
    std::memset(out + begin * cols, 0, static_cast<size_t>((stop - begin) * cols) * sizeof(float));
    begin = stop + 1;
    if (next != uses.targets.end()) ++next;
  }
}

HeadsView heads_first(const Tensor& t) {  // of [batch, heads, tokens, head_dim]
  return {t.const_data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
}

// Memory for what becomes of *x, in its layout where that has no gaps. Heads lie dense in both: *x is copied where its
// do not, and where torch would not put them last in the result, as it may beside strides of 0 or 1.
Tensor result_of(Tensor* x) {
  if (x->stride(3) == 1 || x->numel() == 0) {
    const Tensor out = torch::stable::empty_like(*x);
    if (out.stride(3) == 1 || out.numel() == 0) return out;
  }
  *x = torch::stable::contiguous(*x);
  return new_empty_of(*x, sizes_of(*x), x->scalar_type());
}

void expect_heads(const char* op, const char* what, const Tensor& t, const Tensor& cos) {
  checks::expect_cpu(op, what, t);
  if (cos.scalar_type() != ScalarType::Float) checks::expect_same_dtype(op, what, t, "cos", cos);
  const bool fits = t.dim() == 4 && cos.dim() == 3 && (cos.size(0) == t.size(0) || cos.size(0) == 1) &&
                    cos.size(1) == t.size(2) && cos.size(2) == t.size(3) && t.size(3) % 2 == 0;
  if (!fits) {
    checks::fail("spu::", op, ": ", what, ' ', checks::shape(t), " must be [batch, heads, tokens, head_dim] and cos ",
                 checks::shape(cos), " [batch or 1, tokens, head_dim], head_dim even");
  }
}

}  // namespace

void embedding_dw_sink(Tensor dy, Tensor ids, int64_t padding_idx, Tensor main_grad, Tensor inv_scale, Tensor found_inf,
                       bool accumulate) {
  const char* op = "embedding_dw_";
  checks::expect_cpu(op, "dy", dy);
  checks::expect_cpu(op, "main_grad", main_grad);
  checks::expect_scalar(op, "inv_scale", inv_scale);
  checks::expect_scalar(op, "found_inf", found_inf);
  if (main_grad.dim() != 2 || dy.dim() < 1 || dy.size(dy.dim() - 1) != main_grad.size(1) ||
      dy.numel() != ids.numel() * main_grad.size(1)) {
    checks::fail("spu::", op, ": dy ", checks::shape(dy), " does not fit ids ", checks::shape(ids), " and main_grad ",
                 checks::shape(main_grad));
  }
  const int64_t entries = main_grad.size(0), cols = main_grad.size(1);
  float* out = main_grad_values(op, main_grad, entries * cols);
  const Tensor rows = dense(dy);
  const Type type = storage_type(op, "dy", rows);
  const Uses uses = uses_of(op, ids, entries, padding_idx);
  const int64_t count = static_cast<int64_t>(uses.targets.size()), grain = kGrain / (cols + 1) + 1;
  if (!accumulate) {
    for_ranges(entries, grain, [&](int64_t begin, int64_t end) { clear_others(uses, out, cols, begin, end); });
  }
  const KernelTable& k = kernels();
  const float scale = value(inv_scale);
  int32_t bad = 0;
  for_ranges(count, grain, [&](int64_t begin, int64_t end) {
    bool found = false;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = uses.starts[static_cast<size_t>(i)], last = uses.starts[static_cast<size_t>(i + 1)];
      found |= k.sum_rows(type, rows.const_data_ptr(), cols, uses.sources.data() + first, last - first,
                          out + uses.targets[static_cast<size_t>(i)] * cols, scale, accumulate);
    }
    if (found) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  if (bad) raise_found_inf(found_inf);
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  const char* op = "rotary";
  checks::expect_same_dtype(op, "cos", cos, "sin", sin);
  checks::expect_same_shape(op, "cos", cos, "sin", sin);
  checks::expect_cpu(op, "cos", cos);
  checks::expect_cpu(op, "sin", sin);
  expect_heads(op, "q", q, cos);
  expect_heads(op, "k", k, cos);
  checks::expect_same_dtype(op, "q", q, "k", k);
  if (q.size(0) != k.size(0)) {
    checks::fail("spu::", op, ": q ", checks::shape(q), " and k ", checks::shape(k), " have different batches");
  }
  const int64_t dim = q.size(3);
  const Tensor q_out = result_of(&q), k_out = result_of(&k);
  const Tensor c = dense(cos), s = dense(sin);
  Rotary r = {};
  r.type = storage_type(op, "q", q), r.angles = storage_type(op, "cos", cos);
  r.interleaved = interleaved, r.inverse = inverse;
  r.tokens = q.size(2), r.head_dim = dim, r.cos_batch = cos.size(0) == 1 ? 0 : q.size(2) * dim;
  r.in[0] = heads_first(q), r.in[1] = heads_first(k), r.out[0] = heads_first(q_out), r.out[1] = heads_first(k_out);
  r.heads[0] = q.size(1), r.heads[1] = k.size(1);
  r.cos = c.const_data_ptr(), r.sin = s.const_data_ptr();
  const KernelTable& table = kernels();
  const int64_t grain = kGrain / ((r.heads[0] + r.heads[1]) * dim + 1) + 1;
  for_ranges(q.size(0) * r.tokens, grain, [&](int64_t begin, int64_t end) { table.rotary(r, begin, end); });
  return {q_out, k_out};
}

}  // namespace spu::cpu

// spu::experts_*, rows_sum and rows_dot: the torch side of a mixture of gated experts. Rows lie one expert after the
// other; an expert's products are those of gated.cpp and linear.cpp. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include <cstring>

#include "cpu/products.h"
#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

Tensor integers(const char* op, const char* what, const Tensor& t) {
  checks::expect_cpu(op, what, t);
  checks::expect_dtype(op, what, t, ScalarType::Long);
  return dense(t);
}

const int64_t* values_of(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

Tensor matrix_of(const char* op, const char* what, const Tensor& t) {
  checks::expect_cpu(op, what, t);
  if (t.dim() != 2) checks::fail("spu::", op, ": ", what, " must be a matrix, got shape ", checks::shape(t));
  return dense(t);
}

Tensor weights_of(const char* op, const char* what, const Tensor& t) {
  checks::expect_cpu(op, what, t);
  if (t.dim() != 3) {
    checks::fail("spu::", op, ": ", what, " must be [experts, out, in], got shape ", checks::shape(t));
  }
  return dense(t);
}

// Where each expert's rows end, of `rows` in all; rows behind the last end are nobody's.
class Ends {
 public:
  Ends(const char* op, const Tensor& ends, int64_t rows, int64_t experts)
      : keep_(integers(op, "ends", ends)), ends_(values_of(keep_)), rows_(rows) {
    if (ends.dim() != 1 || ends.size(0) != experts || experts == 0) {
      checks::fail("spu::", op, ": ends ", checks::shape(ends), " must have one value for each of ", experts,
                   " experts");
    }
    for (int64_t e = 0, before = 0; e < experts; before = ends_[e++]) {
      if (ends_[e] < before || ends_[e] > rows) {
        checks::fail("spu::", op, ": ends must rise from 0 to at most ", rows, ", got ", ends_[e], " after ", before);
      }
    }
  }
  int64_t first(int64_t expert) const { return expert ? ends_[expert - 1] : 0; }
  int64_t count(int64_t expert) const { return ends_[expert] - first(expert); }
  int64_t most() const {
    int64_t most = 0;
    for (int64_t e = 0; e < keep_.size(0); ++e) most = std::max(most, count(e));
    return most;
  }
  // Zeroes the rows of a result that are nobody's.
  void clear_rest(const Tensor& t) const {
    const int64_t from = ends_[keep_.size(0) - 1], bytes = t.size(1) * t.element_size();
    if (from < rows_) {
      std::memset(static_cast<char*>(t.mutable_data_ptr()) + from * bytes, 0,
                  static_cast<size_t>((rows_ - from) * bytes));
    }
  }

 private:
  Tensor keep_;
  const int64_t* ends_;
  int64_t rows_;
};

// A matrix, or a weight of each expert, whose parts are taken by their first row.
struct Rows {
  Tensor keep;
  Type type;
  int64_t cols, bytes;

  Rows(const char* op, const char* what, const Tensor& t)
      : keep(t), type(storage_type(op, what, t)), cols(t.size(t.dim() - 1)), bytes(cols * t.element_size()) {}
  const void* at(int64_t row) const { return static_cast<const char*>(keep.const_data_ptr()) + row * bytes; }
  void* out(int64_t row) const { return static_cast<char*>(keep.mutable_data_ptr()) + row * bytes; }
  Operand operand(int64_t row) const { return {at(row), type, cols, 1}; }
  Operand transposed(int64_t row) const { return {at(row), type, 1, cols}; }
};

void expect_fit(const char* op, const Tensor& rows, const Tensor& weight, int64_t wanted, int64_t got) {
  checks::expect_same_dtype(op, "the rows", rows, "the weight", weight);
  if (wanted != got) checks::fail("spu::", op, ": ", checks::shape(rows), " does not fit ", checks::shape(weight));
}

void expect_places(const char* op, const int64_t* places, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (places[i] < 0 || places[i] >= rows) {
      checks::fail("spu::", op, ": a place is ", places[i], ", which is not in [0, ", rows, ")");
    }
  }
}

// The products of all experts' weight gradients, [experts, columns, in]: those of the dzs one below the other.
struct Gradients {
  Rows x;
  std::vector<Rows> dzs;
  Ends ends;
  int64_t experts, columns = 0;

  Gradients(const char* op, const std::vector<Tensor>& given, const Tensor& rows, const Tensor& where, int64_t count)
      : x(op, "x", matrix_of(op, "x", rows)), ends(op, where, rows.size(0), count), experts(count) {
    for (const Tensor& dz : given) {
      dzs.emplace_back(op, "dz", matrix_of(op, "dz", dz));
      columns += dzs.back().cols;
      expect_fit(op, dz, rows, dz.size(0), rows.size(0));
    }
  }

  // Into out, of values of so many bytes; an expert without rows gets zeros if it `stores`.
  void make(ProductOp op, char* out, int64_t bytes, bool stores, Epilogue e) const {
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t first = ends.first(i), count = ends.count(i), call = next_call();
      for (const Rows& dz : dzs) {
        const int64_t size = dz.cols * x.cols * bytes;
        Product p = {dz.cols, x.cols, count, dz.transposed(first), x.operand(first), nullptr, nullptr};
        p.shared_b = call;
        e.out = out, e.main_grad = reinterpret_cast<float*>(out);
        if (count > 0) multiply(op, p, e);
        if (count == 0 && stores) std::memset(out, 0, static_cast<size_t>(size));
        out += size;
      }
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> experts_order(Tensor ids, int64_t experts) {
  const char* op = "experts_order";
  const Tensor given = integers(op, "ids", ids);
  const int64_t* id = values_of(given);
  const int64_t count = ids.numel();
  std::vector<int64_t> next(static_cast<size_t>(experts) + 2, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (id[i] < 0 || id[i] > experts) {
      checks::fail("spu::", op, ": ids has ", id[i], ", which is not in [0, ", experts, "]");
    }
    ++next[static_cast<size_t>(id[i]) + 1];
  }
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  Tensor order = new_empty_of(ids, {count}, ScalarType::Long),
         places = new_empty_of(ids, sizes_of(ids), ScalarType::Long);
  Tensor ends = new_empty_of(ids, {experts}, ScalarType::Long);
  int64_t* from = static_cast<int64_t*>(order.mutable_data_ptr());
  int64_t* to = static_cast<int64_t*>(places.mutable_data_ptr());
  int64_t* end = static_cast<int64_t*>(ends.mutable_data_ptr());
  for (int64_t e = 0; e < experts; ++e) end[e] = next[static_cast<size_t>(e) + 1];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = next[static_cast<size_t>(id[i])]++;
    from[place] = i, to[i] = place;
  }
  return {order, places, ends};
}

Tensor rows_sum(Tensor rows, Tensor places, std::optional<Tensor> factors, ScalarType dtype) {
  const char* op = "rows_sum";
  const Rows in(op, "rows", matrix_of(op, "rows", rows));
  const Tensor place = integers(op, "places", matrix_of(op, "places", places));
  const int64_t count = place.size(0), terms = place.size(1), cols = in.cols;
  if (rows.size(0) >= int64_t{1} << 32) checks::fail("spu::", op, ": ", rows.size(0), " rows are more than 2^32");
  Tensor by;
  if (factors.has_value()) {
    checks::expect_cpu(op, "factors", *factors);
    checks::expect_dtype(op, "factors", *factors, ScalarType::Float);
    checks::expect_same_shape(op, "factors", *factors, "places", places);
    by = dense(*factors);
  }
  const float* factor = factors.has_value() ? static_cast<const float*>(by.const_data_ptr()) : nullptr;
  const int64_t* which = values_of(place);
  expect_places(op, which, place.numel(), rows.size(0));
  const Rows out(op, "a sum", new_empty(rows, {count, cols}, dtype));
  const KernelTable& k = kernels();
  const bool copies = terms == 1 && !factor && in.type == out.type;
  for_ranges(count, kGrain / (cols * terms + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(out.type == Type::fp32 || copies ? 0 : static_cast<size_t>(cols));
    std::vector<uint32_t> named(static_cast<size_t>(terms));
    for (int64_t i = begin; i < end; ++i) {
      if (copies) {
        std::memcpy(out.out(i), in.at(which[i]), static_cast<size_t>(in.bytes));
        continue;
      }
      float* const c = sums.empty() ? static_cast<float*>(out.out(i)) : sums.data();
      for (int64_t j = 0; j < terms; ++j) {
        named[static_cast<size_t>(j)] = static_cast<uint32_t>(which[i * terms + j]);
        if (factor)
          k.sum_rows(in.type, in.at(0), cols, &named[static_cast<size_t>(j)], 1, c, factor[i * terms + j], j > 0);
      }
      if (!factor || terms == 0) k.sum_rows(in.type, in.at(0), cols, named.data(), terms, c, 1.0f, false);
      if (!sums.empty()) k.convert(Type::fp32, c, out.type, out.out(i), 0, cols);
    }
  });
  return out.keep;
}

Tensor rows_dot(Tensor a, Tensor b, Tensor places) {
  const char* op = "rows_dot";
  const Rows left(op, "a", matrix_of(op, "a", a)), right(op, "b", matrix_of(op, "b", b));
  const Tensor place = integers(op, "places", matrix_of(op, "places", places));
  const int64_t terms = place.size(1), cols = left.cols;
  if (place.size(0) != a.size(0) || cols != right.cols) {
    checks::fail("spu::", op, ": a ", checks::shape(a), " does not fit b ", checks::shape(b), " and places ",
                 checks::shape(places));
  }
  const int64_t* which = values_of(place);
  expect_places(op, which, place.numel(), b.size(0));
  Tensor out = new_empty(a, sizes_of(places), ScalarType::Float);
  float* const sums = static_cast<float*>(out.mutable_data_ptr());
  const KernelTable& k = kernels();
  constexpr int64_t kParts = 16;
  for_ranges(a.size(0), kGrain / (cols * terms + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(static_cast<size_t>(cols)), y(static_cast<size_t>(cols));
    for (int64_t i = begin; i < end; ++i) {
      k.convert(left.type, left.at(i), Type::fp32, x.data(), 0, cols);
      for (int64_t j = 0; j < terms; ++j) {
        k.convert(right.type, right.at(which[i * terms + j]), Type::fp32, y.data(), 0, cols);
        float part[kParts] = {};
        int64_t c = 0;
        for (; c + kParts <= cols; c += kParts) {
          for (int64_t p = 0; p < kParts; ++p) part[p] += x[static_cast<size_t>(c + p)] * y[static_cast<size_t>(c + p)];
        }
        for (int64_t p = 0; c < cols; ++c, ++p) part[p] += x[static_cast<size_t>(c)] * y[static_cast<size_t>(c)];
        for (int64_t step = kParts / 2; step > 0; step /= 2) {
          for (int64_t p = 0; p < step; ++p) part[p] += part[p + step];
        }
        sums[i * terms + j] = part[0];
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> experts_mlp(Tensor x, Tensor ends, Tensor w_gate_up, Tensor w_down, Text activation,
                                               bool keep) {
  const char* op = "experts_mlp";
  const Rows in(op, "x", matrix_of(op, "x", x)), up_w(op, "w_gate_up", weights_of(op, "w_gate_up", w_gate_up));
  const Rows down_w(op, "w_down", weights_of(op, "w_down", w_down));
  const int64_t rows = x.size(0), experts = w_gate_up.size(0), hidden = down_w.cols, width = w_down.size(1);
  expect_fit(op, x, w_gate_up, in.cols, up_w.cols);
  expect_fit(op, w_gate_up, w_down, w_gate_up.size(1), 2 * hidden);
  expect_fit(op, w_gate_up, w_down, experts, w_down.size(0));
  const Ends of(op, ends, rows, experts);
  const std::vector<int64_t> sizes = keep ? std::vector<int64_t>{rows, hidden} : std::vector<int64_t>{0};
  const Rows y(op, "y", new_empty(x, {rows, width}, x.scalar_type()));
  const Rows h(op, "h", new_empty(x, {of.most(), hidden}, x.scalar_type()));
  Tensor gate = new_empty(x, sizes, x.scalar_type()), up = new_empty(x, sizes, x.scalar_type());
  Epilogue e = {}, store = {};
  e.kind = Epilogue::gated;
  e.act = gate_act_of(op, activation);
  e.out_type = store.out_type = in.type;
  store.act = math::Act::none;
  e.out = h.out(0);
  for (int64_t i = 0; i < experts; ++i) {
    const int64_t first = of.first(i), count = of.count(i);
    if (count == 0) continue;
    const int64_t place = first * h.bytes;
    e.preact = keep ? static_cast<char*>(gate.mutable_data_ptr()) + place : nullptr;
    e.up = keep ? static_cast<char*>(up.mutable_data_ptr()) + place : nullptr;
    const Operand twin = up_w.transposed((2 * i + 1) * hidden);
    multiply(ProductOp::gated_linear,
             {count, hidden, in.cols, in.operand(first), up_w.transposed(2 * i * hidden), nullptr, &twin}, e);
    store.out = y.out(first);
    multiply(ProductOp::linear, {count, width, hidden, h.operand(0), down_w.transposed(i * width), nullptr, nullptr},
             store);
  }
  of.clear_rest(y.keep);
  if (keep) of.clear_rest(gate), of.clear_rest(up);
  return {y.keep, gate, up};
}

std::tuple<Tensor, Tensor, Tensor> experts_dh(Tensor dy, Tensor ends, Tensor w_down, Tensor gate, Tensor up,
                                              Text activation) {
  const char* op = "experts_dh";
  const Rows d(op, "dy", matrix_of(op, "dy", dy)), w(op, "w_down", weights_of(op, "w_down", w_down));
  const Rows g(op, "gate", matrix_of(op, "gate", gate)), u(op, "up", matrix_of(op, "up", up));
  expect_fit(op, dy, w_down, d.cols, w_down.size(1));
  expect_fit(op, gate, w_down, g.cols, w.cols);
  checks::expect_same_dtype(op, "gate", gate, "up", up);
  checks::expect_same_shape(op, "gate", gate, "up", up);
  if (gate.size(0) != dy.size(0)) {
    checks::fail("spu::", op, ": gate ", checks::shape(gate), " does not fit dy ", checks::shape(dy));
  }
  const Ends of(op, ends, dy.size(0), w_down.size(0));
  const Rows dgate(op, "dgate", empty_as(g.keep)), dup(op, "dup", empty_as(g.keep)), h(op, "h", empty_as(g.keep));
  Epilogue e = {};
  e.kind = Epilogue::gated_derivative;
  e.act = gate_act_of(op, activation);
  e.out_type = d.type;
  for (int64_t i = 0; i < w_down.size(0); ++i) {
    const int64_t first = of.first(i), count = of.count(i);
    if (count == 0) continue;
    e.out = dgate.out(first), e.up = dup.out(first), e.acted = h.out(first);
    e.saved = g.at(first), e.saved_up = u.at(first);
    multiply(ProductOp::linear_dx, {count, w.cols, d.cols, d.operand(first), w.operand(i * d.cols), nullptr, nullptr},
             e);
  }
  for (const Rows* t : {&dgate, &dup, &h}) of.clear_rest(t->keep);
  return {dgate.keep, dup.keep, h.keep};
}

Tensor experts_dx(Tensor dgate, Tensor dup, Tensor ends, Tensor w_gate_up) {
  const char* op = "experts_dx";
  const Rows g(op, "dgate", matrix_of(op, "dgate", dgate)), u(op, "dup", matrix_of(op, "dup", dup));
  const Rows w(op, "w_gate_up", weights_of(op, "w_gate_up", w_gate_up));
  checks::expect_same_dtype(op, "dgate", dgate, "dup", dup);
  checks::expect_same_shape(op, "dgate", dgate, "dup", dup);
  expect_fit(op, dgate, w_gate_up, 2 * g.cols, w_gate_up.size(1));
  const Ends of(op, ends, dgate.size(0), w_gate_up.size(0));
  const Rows dx(op, "dx", new_empty(dgate, {dgate.size(0), w.cols}, dgate.scalar_type()));
  Epilogue e = {};
  e.out_type = g.type;
  for (int64_t i = 0; i < w_gate_up.size(0); ++i) {
    const int64_t first = of.first(i), count = of.count(i);
    if (count == 0) continue;
    e.out = dx.out(first);
    const Operand a2 = u.operand(first), b2 = w.operand((2 * i + 1) * g.cols);
    multiply(ProductOp::gated_dx, {count, w.cols, g.cols, g.operand(first), w.operand(2 * i * g.cols), &a2, &b2}, e);
  }
  of.clear_rest(dx.keep);
  return dx.keep;
}

Tensor experts_dw(std::vector<Tensor> dzs, Tensor x, Tensor ends) {
  const Gradients of("experts_dw", dzs, x, ends, ends.numel());
  Tensor dw = new_empty(x, {ends.numel(), of.columns, of.x.cols}, x.scalar_type());
  Epilogue e = {};
  e.act = math::Act::none;
  e.out_type = of.x.type;
  // Stored as they are, like input gradients: the table's row for weight gradients is of those into a main gradient.
  of.make(ProductOp::linear_dx, static_cast<char*>(dw.mutable_data_ptr()), dw.element_size(), true, e);
  return dw;
}

void experts_dw_sink(std::vector<Tensor> dzs, Tensor x, Tensor ends, Tensor main_grad, Tensor inv_scale,
                     Tensor found_inf, bool accumulate) {
  const char* op = "experts_dw_";
  checks::expect_cpu(op, "main_grad", main_grad);
  checks::expect_scalar(op, "inv_scale", inv_scale);
  checks::expect_scalar(op, "found_inf", found_inf);
  if (main_grad.dim() != 3) {
    checks::fail("spu::", op, ": main_grad must be [experts, out, in], got shape ", checks::shape(main_grad));
  }
  const Gradients of(op, dzs, x, ends, main_grad.size(0));
  float* const out = main_grad_values(op, main_grad, main_grad.size(0) * of.columns * of.x.cols);
  int32_t nonfinite = 0;
  Epilogue e = {};
  e.kind = Epilogue::main_grad_add;
  e.inv_scale = value(inv_scale);
  e.accumulate = accumulate;
  e.nonfinite = &nonfinite;
  of.make(ProductOp::linear_dw, reinterpret_cast<char*>(out), sizeof(float), !accumulate, e);
  if (nonfinite) raise_found_inf(found_inf);
}

}  // namespace spu::cpu

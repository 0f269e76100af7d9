#include "cpu/products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>
#include <cstring>

#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

constexpr const char* kOps[] = {"linear", "linear_dx", "linear_dw", "gated_linear", "gated_dx", "linear_ce"};
constexpr const char* kTypes[] = {"fp32", "fp16", "bf16"};
constexpr const char* kClasses[] = {"row", "skinny", "few", "small", "deep", "large"};
constexpr int kOpCount = 6, kTypeCount = 3, kClassCount = 6;

constexpr int64_t kRow = 4, kSkinny = 64, kFew = 128, kSmall = int64_t{1} << 27, kDeep = 2048;

// A place holds null (the chosen kernels), another instruction set's table, or kTorch.
const KernelTable kTorch = {};
std::atomic<const KernelTable*> ways[kOpCount][kTypeCount][kClassCount] = {};

int type_place(Type type) {
  return type == Type::fp32 ? 0 : type == Type::fp16 ? 1 : 2;
}

int class_place(int64_t m, int64_t n, int64_t k) {
  if (m <= kRow) return 0;
  if (m <= kSkinny) return 1;
  if (m <= kFew || k <= kFew) return 2;
  if (m * n <= kSmall / k) return 3;
  return k > kDeep ? 4 : 5;
}

template <size_t N>
int place_of(const char* const (&names)[N], const char* name) {
  for (size_t i = 0; i < N; ++i) {
    if (!std::strcmp(names[i], name)) return static_cast<int>(i);
  }
  return -1;
}

Tensor matrix(const float* data, int64_t rows, int64_t cols, int64_t row, int64_t col) {
  const std::array<int64_t, 2> sizes = {rows, cols}, strides = {row, col};
  return torch::stable::from_blob(const_cast<float*>(data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

// Straight to the CPU's kernel: by the dispatcher a product of a few rows took three times as long.
void torch_mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

void torch_add_mm(const Tensor& a, const Tensor& b, const Tensor& sums) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sums.get(), sums.get(), a.get(), b.get(), 1.0, 1.0));
}

// torch.set_float32_matmul_precision may let fp32 products round their operands to fewer bits, at any time. No stable
// interface tells, but a small product does: 1 + 2^-12 has a bit that neither bf16 nor TF32 keeps. A thread makes its
// operands once: the question is asked before every product of torch's.
bool torch_is_exact() {
  constexpr int64_t side = 24;  // oneDNN takes products from 16 x 16 x 16 on
  struct Probe {
    float a[side * side], ones[side * side], out[side * side];
    Tensor as, bs;
    Probe() : as(square(a)), bs(square(ones)) {
      for (float& value : a) value = 1.0f + 0x1p-12f;
      for (float& value : ones) value = 1.0f;
    }
    static Tensor square(float* data) { return matrix(data, side, side, side, 1); }
  };
  thread_local Probe probe;
  probe.out[0] = 0.0f;
  torch_mm(probe.as, probe.bs, Probe::square(probe.out));  // one made in inference mode could not be written after it
  return probe.out[0] == side * (1.0f + 0x1p-12f);
}

// x [rows, cols] as fp32 with a unit stride: itself, or widened into a workspace, with the layout that it has.
Tensor widened(const Operand& x, int64_t rows, int64_t cols, int slot) {
  if (x.type == Type::fp32) return matrix(static_cast<const float*>(x.data), rows, cols, x.row, x.col);
  const bool by_rows = x.col == 1;
  const int64_t lines = by_rows ? rows : cols, length = by_rows ? cols : rows, step = by_rows ? x.row : x.col;
  const KernelTable& k = kernels();
  const char* from = static_cast<const char*>(x.data);
  float* out = workspace(slot, rows * cols);
  for_ranges(lines, kGrain / (length + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      k.convert(x.type, from + i * step * 2, Type::fp32, out + i * length, 0, length);
    }
  });
  return matrix(out, rows, cols, by_rows ? length : 1, by_rows ? 1 : length);
}

bool dense_lines(const Operand& x) {
  return x.row == 1 || x.col == 1;
}

// Rows [begin, end) of an operand, or of its product.
Operand rows_of(const Operand& x, int64_t begin) {
  const int64_t size = x.type == Type::fp32 ? 4 : 2;
  return {static_cast<const char*>(x.data) + begin * x.row * size, x.type, x.row, x.col};
}

// Memory of torch's way: sums of so many values at a time, and widened weights up to a bound.
constexpr int64_t kBlockSums = int64_t{1} << 22, kBlockRows = 256, kMostWidened = int64_t{1} << 24;

// The sums of an epilogue with fp32 results are made where a result is to be, which the epilogue reads before it writes
// there: no memory beside, and no second writing of what is stored as it is.
struct InPlace {
  float *c, *c2;  // null where the workspace serves
  Epilogue rest;  // what is left to do
  bool done;      // nothing is
};

InPlace in_place(const Epilogue& e) {
  InPlace place = {nullptr, nullptr, e, false};
  if (e.kind == Epilogue::main_grad_add) {
    place.c = e.accumulate ? nullptr : e.main_grad;
  } else if (e.out_type != Type::fp32) {
    return place;
  } else if (e.kind == Epilogue::gated && e.preact && e.up) {
    place.c = static_cast<float*>(e.preact), place.c2 = static_cast<float*>(e.up);
    place.rest.preact = place.rest.up = nullptr;
  } else if (e.kind == Epilogue::store || e.kind == Epilogue::gated || e.kind == Epilogue::gated_derivative) {
    place.c = static_cast<float*>(e.out);
    place.done = e.kind == Epilogue::store && e.act == math::Act::none && !e.bias && !e.preact && !e.addend;
  }
  return place;
}

// By torch's fp32 product into fp32 sums, then the epilogue; a chained product (a2) is added to the first's sums. False
// where that cannot serve: nothing is done then.
bool by_torch(const Product& p, const Epilogue& e) {
  const bool second = p.b2 != nullptr, chained = p.a2 != nullptr, wide = p.b.type == Type::fp32;
  if (!dense_lines(p.a) || !dense_lines(p.b) || p.k == 0) return false;
  if ((second && !dense_lines(*p.b2)) || (chained && !dense_lines(*p.a2))) return false;
  if ((!wide && (second ? 2 : 1) * p.n * p.k > kMostWidened) || !torch_is_exact()) return false;
  const Tensor b = widened(p.b, p.k, p.n, kLocalB), b2 = second ? widened(*p.b2, p.k, p.n, kLocalC) : b;
  const InPlace place = in_place(e);
  const int64_t fit = kBlockSums / p.n, most = fit > kBlockRows ? fit : kBlockRows;
  const int64_t rows = p.m < most || (wide && place.done && !second) ? p.m : most;
  const bool own = !place.c, own2 = second && !chained && !place.c2;  // in the workspace
  float* const room = own || own2 ? workspace(kSharedC, (own + own2) * rows * p.n) : nullptr;
  const KernelTable& k = kernels();
  for (int64_t r = 0; r < p.m; r += rows) {
    const int64_t count = p.m - r < rows ? p.m - r : rows;
    float* const c = own ? room : place.c + r * p.n;
    float* const c2 = !second || chained ? c : own2 ? room + own * rows * p.n : place.c2 + r * p.n;
    const Tensor a = widened(rows_of(p.a, r), count, p.k, kSharedA), sums = matrix(c, count, p.n, p.n, 1);
    torch_mm(a, b, sums);
    if (chained) {
      torch_add_mm(widened(rows_of(*p.a2, r), count, p.k, kSharedA), b2, sums);
    } else if (second) {
      torch_mm(a, b2, matrix(c2, count, p.n, p.n, 1));
    }
    if (place.done) continue;
    for_ranges(count, kGrain / (p.n + 1) + 1, [&](int64_t begin, int64_t end) {
      k.finish(place.rest, c + begin * p.n, c2 + begin * p.n, p.n, r + begin, r + end);
    });
  }
  return true;
}

}  // namespace

void multiply(ProductOp op, const Product& p, const Epilogue& e) {
  if (p.m == 0 || p.n == 0) return;
  const std::atomic<const KernelTable*>& place =
      ways[static_cast<int>(op)][type_place(p.a.type)][class_place(p.m, p.n, p.k)];
  const KernelTable* way = place.load(std::memory_order_acquire);
  if (way == &kTorch) {
    if (by_torch(p, e)) return;
    way = nullptr;
  }
  (way ? *way : kernels()).gemm(p, e);
}

int64_t next_call() {
  static thread_local int64_t calls = 0;
  return ++calls;
}

bool set_way(const char* op, const char* type, const char* shape_class, const char* way) {
  const int o = place_of(kOps, op), t = place_of(kTypes, type), s = place_of(kClasses, shape_class);
  if (o < 0 || t < 0 || s < 0) return false;
  const KernelTable* found = nullptr;
  if (!std::strcmp(way, "torch")) {
    if ((s == 0 && std::strcmp(op, "linear_dx")) || !std::strcmp(op, "linear_ce")) return false;
    found = &kTorch;
  } else if (*way) {
    found = kernels_named(way);
    if (!found) return false;
  }
  ways[o][t][s].store(found, std::memory_order_release);
  return true;
}

const char* way_of(const char* op, const char* type, int64_t m, int64_t n, int64_t k) {
  const int o = place_of(kOps, op), t = place_of(kTypes, type);
  if (o < 0 || t < 0) return nullptr;
  const KernelTable* way = ways[o][t][class_place(m, n, k)].load(std::memory_order_acquire);
  return way == &kTorch ? "torch" : way ? way->name : kernels().name;
}

}  // namespace spu::cpu

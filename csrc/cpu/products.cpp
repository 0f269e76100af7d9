#include "cpu/products.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>
#include <cstring>

#include "cpu/tensors.h"

namespace spu {
namespace cpu {
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

void torch_mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                                       torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // its reference to out
}

// torch.set_float32_matmul_precision may let fp32 products round their operands to fewer bits, at any time. No stable
// interface tells, but a small product does: 1 + 2^-12 has a bit that neither bf16 nor TF32 keeps.
bool torch_is_exact() {
  constexpr int64_t side = 24;  // oneDNN takes products from 16 x 16 x 16 on
  float a[side * side], ones[side * side], out[side * side] = {};
  for (float& value : a) value = 1.0f + 0x1p-12f;
  for (float& value : ones) value = 1.0f;
  torch_mm(matrix(a, side, side, side, 1), matrix(ones, side, side, side, 1), matrix(out, side, side, side, 1));
  return out[0] == side * (1.0f + 0x1p-12f);
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

// c += c2, of `count` values.
void add_sums(float* c, const float* c2, int64_t count) {
  for_ranges(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) c[i] += c2[i];
  });
}

// By torch's fp32 product into fp32 sums, then the epilogue; a chained product (a2) is made apart and added to the
// first's sums. False where that cannot serve: nothing is done then.
bool by_torch(const Product& p, const Epilogue& e) {
  const bool second = p.b2 != nullptr, chained = p.a2 != nullptr, wide = p.b.type == Type::fp32;
  if (!dense_lines(p.a) || !dense_lines(p.b) || p.k == 0) return false;
  if ((second && !dense_lines(*p.b2)) || (chained && !dense_lines(*p.a2))) return false;
  if ((!wide && (second ? 2 : 1) * p.n * p.k > kMostWidened) || !torch_is_exact()) return false;
  const Tensor b = widened(p.b, p.k, p.n, kLocalB), b2 = second ? widened(*p.b2, p.k, p.n, kLocalC) : b;
  const bool plain = e.kind == Epilogue::store && e.act == math::Act::none && !e.bias && !e.preact && !chained;
  if (plain && e.out_type == Type::fp32) {
    torch_mm(widened(p.a, p.m, p.k, kSharedA), b, matrix(static_cast<float*>(e.out), p.m, p.n, p.n, 1));
    return true;
  }
  const int64_t fit = kBlockSums / p.n, most = fit > kBlockRows ? fit : kBlockRows;
  const int64_t rows = p.m < most ? p.m : most;
  float* c = workspace(kSharedC, (second ? 2 : 1) * rows * p.n);
  float* c2 = second ? c + rows * p.n : c;
  const KernelTable& k = kernels();
  for (int64_t r = 0; r < p.m; r += rows) {
    const int64_t count = p.m - r < rows ? p.m - r : rows;
    const Tensor a = widened(rows_of(p.a, r), count, p.k, kSharedA);
    torch_mm(a, b, matrix(c, count, p.n, p.n, 1));
    if (second) {
      torch_mm(chained ? widened(rows_of(*p.a2, r), count, p.k, kSharedA) : a, b2, matrix(c2, count, p.n, p.n, 1));
    }
    if (chained) add_sums(c, c2, count * p.n);
    for_ranges(count, kGrain / (p.n + 1) + 1, [&](int64_t begin, int64_t end) {
      k.finish(e, c + begin * p.n, c2 + begin * p.n, p.n, r + begin, r + end);
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

bool set_way(const char* op, const char* type, const char* shape_class, const char* way) {
  const int o = place_of(kOps, op), t = place_of(kTypes, type), s = place_of(kClasses, shape_class);
  if (o < 0 || t < 0 || s < 0) return false;
  const KernelTable* found = nullptr;
  if (!std::strcmp(way, "torch")) {
    if (s == 0 || !std::strcmp(op, "linear_ce")) return false;
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

}  // namespace cpu
}  // namespace spu

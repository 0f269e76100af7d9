// Products by cuBLASLt.
//
// It stores matrices by columns, so it is asked for the transpose, out^T = B^T A^T: its first operand is our B, its
// second our A, and its bias, one value a row of its result, is ours, one a column.
#include "cuda/gemm_library.h"

#include <array>
#include <limits>
#include <map>
#include <memory>
#include <mutex>

#include "cuda/cublaslt.h"
#include "cuda/pointwise.h"

namespace spu::cuda {
namespace {

constexpr uint64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for sm_90; from torch's allocator, for one launch
constexpr int kAlgorithms = 8;                  // asked for at once: the first may not be one for this device's limits
constexpr size_t kPlans = 4096;                 // kept; sizes of batches that never repeat would fill memory

void expect(const lt::Library& library, lt::Status status, const char* what) {
  if (status != lt::kSuccess) {
    throw std::runtime_error(std::string("spu: cuBLASLt's ") + what + " failed: " + library.status_name(status));
  }
}

// How an operand [rows, cols] lies in memory: dense rows or columns that start `stride` elements apart.
struct Stored {
  bool by_rows;
  int64_t stride;
};

bool stored(const Operand& x, int64_t rows, int64_t cols, Stored* found) {
  // Along a dimension of one element there is no stride.
  if (x.col == 1 || cols == 1) {
    const int64_t stride = rows == 1 ? (cols + 7) / 8 * 8 : x.row;
    if (stride >= cols && stride % 8 == 0) {
      *found = {true, stride};
      return true;
    }
  }
  if (x.row == 1 || rows == 1) {
    const int64_t stride = cols == 1 ? (rows + 7) / 8 * 8 : x.col;
    if (stride >= rows && stride % 8 == 0) {
      *found = {false, stride};
      return true;
    }
  }
  return false;
}

// 256, 16 or less: what divides an address. Two classes, or each view into a larger buffer would be searched for.
int64_t alignment(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  return address % 256 == 0 ? 256 : address % 16 == 0 ? 16 : 1;
}

lt::DataType data_type(Type type) {
  return type == Type::fp16 ? lt::kHalf : type == Type::bf16 ? lt::kBfloat16 : lt::kFloat;
}

// What of the epilogue the library does. Its gelu is the form with tanh; its relu makes 0 of NaN, which has to stay for
// the loss scale to be lowered; it knows no other activation and no gate. (Its sum of a bias's gradient has the
// result's type: fp16 would overflow where a sum in fp32 does not, so it is not asked for.)
struct Fused {
  lt::Epilogue epilogue;
  bool activation;
};

Fused fused(const Gemm& g) {
  const bool bias = g.bias != nullptr;
  if (g.saved != nullptr) {
    const bool gelu = g.act == math::Act::gelu_tanh;
    return {gelu ? lt::kGeluGradient : lt::kPlain, gelu};
  }
  if (g.form == Form::forward && g.act == math::Act::gelu_tanh && g.gate == nullptr) {
    if (g.preact != nullptr) return {bias ? lt::kGeluAuxBias : lt::kGeluAux, true};
    return {bias ? lt::kGeluBias : lt::kGelu, true};
  }
  const bool plain = g.act == math::Act::none && g.gate == nullptr && g.preact == nullptr;
  return {bias ? lt::kBias : lt::kPlain, plain || g.form != Form::forward};
}

// The descriptions of one product, and the algorithm that was found for it. The description's pointers are set before
// each launch, under the lock.
struct Plan {
  const lt::Library& library;
  lt::Context* context = nullptr;
  lt::Description* description = nullptr;
  lt::Layout *first = nullptr, *second = nullptr, *result = nullptr;
  const float* zero_and_one = nullptr;  // in device memory
  lt::Heuristic found = {};
  bool usable = false;
  std::mutex lock;

  explicit Plan(const lt::Library& given) : library(given) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (description != nullptr) library.description_destroy(description);
    for (lt::Layout* layout : {first, second, result}) {
      if (layout != nullptr) library.layout_destroy(layout);
    }
  }

  template <class T>
  void set(lt::Attribute attribute, T value) {
    expect(library, library.description_set(description, attribute, &value, sizeof(value)), "description");
  }
};

// A context for each device, made at its first product and kept until the process ends.
lt::Context* context_of(const lt::Library& library, int device) {
  static std::mutex lock;
  static std::map<int, lt::Context*> contexts;
  const std::lock_guard<std::mutex> guard(lock);
  lt::Context*& made = contexts[device];
  if (made == nullptr) expect(library, library.create(&made), "start");
  return made;
}

// What the choice of an algorithm depends on.
using Key = std::array<int64_t, 15>;

struct Layouts {
  Stored a, b;
};

Key key_of(const Gemm& g, const Layouts& at, int device, int algorithm) {
  const void* out = g.form == Form::dw ? g.main_grad : g.out;
  const int64_t flags = (at.a.by_rows ? 1 : 0) + (at.b.by_rows ? 2 : 0);
  return {device,
          static_cast<int64_t>(g.form),
          static_cast<int64_t>(g.type),
          g.m,
          g.n,
          g.k,
          at.a.stride,
          at.b.stride,
          flags,
          static_cast<int64_t>(fused(g).epilogue),
          alignment(g.a.data),
          alignment(g.b.data),
          alignment(out),
          alignment(g.bias),
          algorithm};
}

bool has_aux(lt::Epilogue epilogue) {
  return epilogue == lt::kGeluAux || epilogue == lt::kGeluAuxBias || epilogue == lt::kGeluGradient;
}

void set_pointers(Plan& plan, const Gemm& g, lt::Epilogue epilogue) {
  if (g.bias != nullptr) plan.set(lt::kBiasPointer, g.bias);
  if (has_aux(epilogue)) plan.set(lt::kAuxPointer, g.saved != nullptr ? g.saved : g.preact);
}

void describe(Plan& plan, const Gemm& g, const Layouts& at) {
  const lt::Library& library = plan.library;
  const lt::DataType type = data_type(g.type), out_type = g.form == Form::dw ? lt::kFloat : type;
  expect(library, library.description_create(&plan.description, lt::kComputeFloat, lt::kFloat), "description");
  // Rows of ours are its columns: B [k, n] by rows is its [n, k] as it stands, by columns its [k, n], to be transposed.
  plan.set(lt::kTransposeA, static_cast<int32_t>(at.b.by_rows ? lt::kAsStored : lt::kTransposed));
  plan.set(lt::kTransposeB, static_cast<int32_t>(at.a.by_rows ? lt::kAsStored : lt::kTransposed));
  plan.set(lt::kPointerMode, static_cast<int32_t>(g.form == Form::dw ? lt::kOnDevice : lt::kOnHost));
  const lt::Epilogue epilogue = fused(g).epilogue;
  plan.set(lt::kEpilogue, static_cast<uint32_t>(epilogue));
  if (has_aux(epilogue)) plan.set(lt::kAuxStride, g.n);
  set_pointers(plan, g, epilogue);  // the heuristic looks at their alignment
  const auto layout = [&](lt::Layout** made, lt::DataType of, int64_t rows, int64_t columns, int64_t stride) {
    const auto r = static_cast<uint64_t>(rows), c = static_cast<uint64_t>(columns);
    expect(library, library.layout_create(made, of, r, c, stride), "layout");
  };
  layout(&plan.first, type, at.b.by_rows ? g.n : g.k, at.b.by_rows ? g.k : g.n, at.b.stride);
  layout(&plan.second, type, at.a.by_rows ? g.k : g.m, at.a.by_rows ? g.m : g.k, at.a.stride);
  layout(&plan.result, out_type, g.n, g.m, g.n);
}

// Asks for algorithms that keep the promise of one rounding: parts of a long inner dimension are added up in fp32.
void search(Plan& plan, const Gemm& g, int algorithm) {
  const lt::Library& library = plan.library;
  lt::Preference* made = nullptr;
  expect(library, library.preference_create(&made), "preference");
  const std::unique_ptr<lt::Preference, lt::Status (*)(lt::Preference*)> kept(made, library.preference_destroy);
  const auto prefer = [&](int attribute, auto value) {
    const auto which = static_cast<lt::PreferenceAttribute>(attribute);
    expect(library, library.preference_set(made, which, &value, sizeof(value)), "preference");
  };
  prefer(lt::kWorkspaceBytes, kWorkspaceBytes);
  prefer(lt::kReductionSchemes, lt::kReduceInFloat);
  const void* out = g.form == Form::dw ? g.main_grad : g.out;
  const void* operands[] = {g.b.data, g.a.data, out, out};
  for (int i = 0; i < 4; ++i) prefer(lt::kAlignmentA + i, static_cast<uint32_t>(alignment(operands[i])));
  lt::Heuristic found[kAlgorithms] = {};
  int count = 0;
  const lt::Status status = library.heuristic(plan.context, plan.description, plan.first, plan.second, plan.result,
                                              plan.result, made, kAlgorithms, found, &count);
  if (status == lt::kNotSupported) return;
  expect(library, status, "search for an algorithm");
  for (int i = 0, usable = 0; i < count && usable <= algorithm; ++i) {
    if (found[i].state != lt::kSuccess || found[i].workspace > kWorkspaceBytes) continue;
    plan.found = found[i];
    plan.usable = true;
    ++usable;
  }
}

std::mutex plans_lock;
std::map<Key, std::shared_ptr<Plan>> plans;

std::shared_ptr<Plan> plan_of(const lt::Library& library, const Gemm& g, const Layouts& at, int device, int algorithm) {
  const Key key = key_of(g, at, device, algorithm);
  const std::lock_guard<std::mutex> guard(plans_lock);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() >= kPlans) plans.clear();
  auto made = std::make_shared<Plan>(library);
  made->context = context_of(library, device);
  made->zero_and_one = zero_and_one();
  describe(*made, g, at);
  search(*made, g, algorithm);
  plans.emplace(key, made);
  return made;
}

bool takes(const Gemm& g, Layouts* at) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const void* out = g.form == Form::dw ? static_cast<const void*>(g.main_grad) : g.out;
  for (const void* p : {g.a.data, g.b.data, g.bias, out, static_cast<const void*>(g.preact), g.gate, g.saved}) {
    if (alignment(p) < 16) return false;
  }
  return g.type != Type::fp32 && g.m > 0 && g.k > 0 && g.n > 0 && g.n % 8 == 0 && g.m <= most && g.n <= most &&
         g.k <= most && stored(g.a, g.m, g.k, &at->a) && stored(g.b, g.k, g.n, &at->b);
}

// *found_inf = 1 if a sum of products was not finite, by a pass over what is smaller. Products of fp16 values, added up
// in fp32, do not overflow: a sum is finite where its operands are, and an operand that is not makes a whole row or
// column of sums that are not. bf16 products may overflow by themselves, so the result is looked at: what is not finite
// stays so in whatever is added to it, so an earlier microbatch's overflow is found again, never lost.
void find_overflow(const Gemm& g, const Layouts& at, cudaStream_t stream) {
  const bool dense = at.a.stride == (at.a.by_rows ? g.k : g.m) && at.b.stride == (at.b.by_rows ? g.n : g.k);
  if (g.type == Type::fp16 && dense && (g.m + g.n) * g.k < 2 * g.m * g.n) {
    launch_find_nonfinite(g.type, g.a.data, g.m * g.k, g.found_inf, stream);
    launch_find_nonfinite(g.type, g.b.data, g.k * g.n, g.found_inf, stream);
  } else {
    launch_find_nonfinite(Type::fp32, g.main_grad, g.m * g.n, g.found_inf, stream);
  }
}

lt::Status multiply(Plan& plan, const Gemm& g, void* out, cudaStream_t stream, Scratch& scratch) {
  static constexpr float one = 1.0f, zero = 0.0f;
  const bool weight = g.form == Form::dw;
  const void* alpha = weight ? static_cast<const void*>(g.inv_scale) : &one;
  const void* beta = weight ? static_cast<const void*>(plan.zero_and_one + (g.accumulate ? 1 : 0)) : &zero;
  const size_t bytes = plan.found.workspace;
  void* workspace = bytes > 0 ? scratch.bytes(static_cast<int64_t>(bytes)) : nullptr;
  const std::lock_guard<std::mutex> guard(plan.lock);
  set_pointers(plan, g, fused(g).epilogue);
  return plan.library.multiply(plan.context, plan.description, alpha, g.b.data, plan.first, g.a.data, plan.second, beta,
                               out, plan.result, out, plan.result, &plan.found.algorithm, workspace, bytes, stream);
}

}  // namespace

bool launch_gemm_library(const Gemm& g, cudaStream_t stream, Scratch& scratch, int algorithm) {
  const lt::Library* library = lt::cublaslt();
  Layouts at;
  if (library == nullptr || !takes(g, &at)) return false;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const Fused how = fused(g);
  Gemm product = g;
  // Where a pass of ours applies the activation, the product is its pre-activation, kept or not.
  if (!how.activation && g.preact != nullptr) product.out = g.preact;
  const std::shared_ptr<Plan> plan = plan_of(*library, product, at, device, algorithm);
  if (!plan->usable) return false;
  const lt::Status status = multiply(*plan, product, g.form == Form::dw ? g.main_grad : product.out, stream, scratch);
  if (status == lt::kNotSupported) {
    const std::lock_guard<std::mutex> guard(plan->lock);
    plan->usable = false;
    return false;
  }
  expect(*library, status, "product");
  if (!how.activation && g.saved != nullptr) {
    launch_dz(g.type, g.act, g.out, g.saved, g.out, g.m * g.n, stream);
  } else if (!how.activation) {
    launch_activation(g.type, g.act, product.out, g.gate, g.out, g.m * g.n, stream);
  }
  if (g.form == Form::dw && g.found_inf != nullptr) find_overflow(g, at, stream);
  return true;
}

size_t library_plans() {
  const std::lock_guard<std::mutex> guard(plans_lock);
  return plans.size();
}

}  // namespace spu::cuda

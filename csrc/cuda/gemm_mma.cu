// Products on the tensor cores of sm_75 and of sm_80 and later (mma.sync), by CUTLASS's 2.x kernels with an epilogue
// visitor tree. Compiled once for each architecture and form, SPU_ARCH and SPU_FORM, in all types and tiles: reading
// CUTLASS's headers takes a compiler longer than making a kernel of them.
#include "cuda/gemm_fusion.h"
#include "cuda/gemm_tensor_core.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

namespace spu::cuda {
namespace {

namespace evt = cutlass::epilogue::threadblock;
using cutlass::gemm::GemmShape;

constexpr Form kForm = Form::SPU_FORM;
constexpr bool kWeight = kForm == Form::dw;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using LayoutA = cutlass::platform::conditional<kWeight, Column, Row>::type;
using LayoutB = cutlass::platform::conditional<kForm == Form::forward, Column, Row>::type;

#if SPU_ARCH == 75
using Arch = cutlass::arch::Sm75;
using Instruction = GemmShape<16, 8, 8>;
constexpr int kStages = 2, kSmallDepth = 32;
#else
using Arch = cutlass::arch::Sm80;
using Instruction = GemmShape<16, 8, 16>;
constexpr int kStages = 4, kSmallDepth = 64;
#endif
template <Type T, Tile S>
struct Product {
  static constexpr bool kSmall = S == Tile::small;
  using Element = typename fusion::ElementOf<T>::type;
  using Output = typename cutlass::platform::conditional<kWeight, float, Element>::type;
  using Block =
      typename cutlass::platform::conditional<kSmall, GemmShape<64, 64, kSmallDepth>, GemmShape<128, 128, 32>>::type;
  using Warp =
      typename cutlass::platform::conditional<kSmall, GemmShape<32, 32, kSmallDepth>, GemmShape<64, 64, 32>>::type;

  static constexpr int kAccess = 128 / cutlass::sizeof_bits<Output>::value;  // elements in 16 bytes
  using Map = evt::OutputTileThreadLayout<Block, Warp, Output, kAccess, 1>;
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;
  using None = cute::Stride<cute::_0, cute::_0, cute::_0>;
  using Scalar = evt::VisitorScalarBroadcast<float>;
  using Store = evt::VisitorAuxStore<Map, Output, fusion::kNearest, Stride>;

  template <template <class> class Function>
  using Compute = evt::VisitorCompute<Function, float, float, fusion::kNearest>;

  // A store that does nothing on a null pointer.
  struct OptionalStore : Store {
    using Store::Store;

    template <class Base>
    struct Callbacks : Base {
      CUTLASS_DEVICE explicit Callbacks(Base&& base) : Base(static_cast<Base&&>(base)) {}
      CUTLASS_DEVICE void end_step(int step) {
        if (this->params_ptr->ptr_aux != nullptr) Base::end_step(step);
      }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
      auto base = Store::get_callbacks(tile, thread, shape);
      return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base));
    }
  };

  // A load that is skipped on a null pointer; AddIf and Activate then ignore its result.
  struct OptionalLoad : evt::VisitorAuxLoad<Map, Output, Stride> {
    using Load = evt::VisitorAuxLoad<Map, Output, Stride>;
    using Load::Load;

    template <class Base>
    struct Callbacks : Base {
      CUTLASS_DEVICE explicit Callbacks(Base&& base) : Base(static_cast<Base&&>(base)) {}
      CUTLASS_DEVICE void begin_step(int step) {
        if (this->params_ptr->ptr_aux != nullptr) Base::begin_step(step);
      }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
      auto base = Load::get_callbacks(tile, thread, shape);
      return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base));
    }
  };

  // The epilogue of each form: its visitor tree and the tree's arguments. (Out delays a form that is not this
  // object's.)
  template <Form F, class Out>
  struct Fusion;

  // store(act(store(accumulator + bias))), or with a gate store(act(gate) * store(accumulator + bias))
  template <class Out>
  struct Fusion<Form::forward, Out> {
    using Bias = evt::VisitorRowBroadcast<Map, Out, cute::Stride<cute::_0, cute::_1, int32_t>>;
    using Sum = evt::Sm80EVT<Compute<cutlass::plus>, Bias, evt::VisitorAccFetch>;
    using Preact = evt::Sm80EVT<OptionalStore, Sum>;
    using Act = evt::Sm80EVT<Compute<fusion::Activate>, Scalar, OptionalLoad, Preact>;
    using Tree = evt::Sm80EVT<Store, Act>;

    static typename Tree::Arguments arguments(const Gemm& g) {
      const Stride stride = {g.n, cute::_1{}, 0};
      const typename Bias::Arguments bias = {static_cast<const Out*>(g.bias), Out(0), {}};
      const typename Scalar::Arguments act = {{fusion::choice_of(g)}, {nullptr}, {}};
      // CUTLASS's load takes a pointer to non-const
      Out* gate = static_cast<Out*>(const_cast<void*>(g.gate));
      const typename Preact::Arguments preact = {{bias, {}, {}}, {static_cast<Out*>(g.preact), stride}};
      return {{act, {gate, Out(0), stride}, preact, {}}, {static_cast<Out*>(g.out), stride}};
    }
  };

  // store(accumulator)
  template <class Out>
  struct Fusion<Form::dx, Out> {
    using Tree = evt::Sm80EVT<Store, evt::VisitorAccFetch>;

    static typename Tree::Arguments arguments(const Gemm& g) {
      return {{}, {static_cast<Out*>(g.out), {g.n, cute::_1{}, 0}}};
    }
  };

  // store(add_if(accumulate, main_grad, inv_scale * flag(accumulator)))
  template <class Out>
  struct Fusion<Form::dw, Out> {
    using Flag = evt::Sm80EVT<
        evt::VisitorScalarReduction<fusion::AnyNonFinite, fusion::RaiseFlag, Map, Out, Out, fusion::kNearest, None>,
        evt::VisitorAccFetch>;
    using Scaled = evt::Sm80EVT<Compute<cutlass::multiplies>, Scalar, Flag>;
    using Sum = evt::Sm80EVT<Compute<fusion::AddIf>, Scalar, OptionalLoad, Scaled>;
    using Tree = evt::Sm80EVT<Store, Sum>;

    static typename Tree::Arguments arguments(const Gemm& g) {
      const Stride stride = {g.n, cute::_1{}, 0};
      const typename Scalar::Arguments wanted = {{g.accumulate ? 1.0f : 0.0f}, {nullptr}, {}};
      const typename Scalar::Arguments inv_scale = {{0.0f}, {g.inv_scale}, {}};
      const typename Flag::Arguments flag = {{}, {g.found_inf, 0.0f, {}}};
      const typename Scaled::Arguments scaled = {inv_scale, flag, {}};
      return {{wanted, {g.accumulate ? g.main_grad : nullptr, 0.0f, stride}, scaled, {}}, {g.main_grad, stride}};
    }
  };

  using Epilogue = Fusion<kForm, Output>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Element, LayoutA, cutlass::ComplexTransform::kNone, 8, Element, LayoutB, cutlass::ComplexTransform::kNone, 8,
      Output, Row, kAccess, float, float, cutlass::arch::OpClassTensorOp, Arch, Block, Warp, Instruction,
      typename Epilogue::Tree, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAdd, 1>::GemmKernel;
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static constexpr int kBlockThreads = Kernel::kThreadCount, kBlockShared = sizeof(typename Kernel::SharedStorage);

  static bool launch(const Gemm& g, int, cudaStream_t stream) {
    const int64_t lda = kWeight ? g.a.col : g.a.row;
    const int64_t ldb = kForm == Form::forward ? g.b.col : g.b.row;
    typename Adapter::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k)},
        1, Epilogue::arguments(g), g.a.data, g.b.data, nullptr, nullptr, 0, 0, 0, 0, lda, ldb, g.n, g.n);
    Adapter gemm;
    return gemm.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess &&
           gemm.run(stream) == cutlass::Status::kSuccess;
  }
};

}  // namespace

SPU_PRODUCT(fp16, large)
#if SPU_ARCH != 75
SPU_PRODUCT(bf16, large)
#endif
#if SPU_SMALL
SPU_PRODUCT(fp16, small)
#if SPU_ARCH != 75
SPU_PRODUCT(bf16, small)
#endif
#endif

}  // namespace spu::cuda

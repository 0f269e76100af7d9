// Products on the tensor cores of sm_90a (wgmma fed by TMA, warp-specialised), by CUTLASS's 3.x collectives with an
// epilogue visitor tree. Compiled once for each form, SPU_FORM (SPU_ARCH is 90), in all types.
#include "cuda/gemm_fusion.h"
#include "cuda/gemm_tensor_core.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

namespace spu::cuda {
namespace {

namespace evt = cutlass::epilogue::fusion;
namespace epi = cutlass::epilogue::collective;
namespace gemm = cutlass::gemm;
using cute::_0;
using cute::_1;

constexpr Form kForm = Form::SPU_FORM;
constexpr bool kWeight = kForm == Form::dw;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using LayoutA = cute::conditional_t<kWeight, Column, Row>;
using LayoutB = cute::conditional_t<kForm == Form::forward, Column, Row>;

// Pingpong: two groups of four warps each have a tile of their own, and one's products run beside the other's epilogue.
// (Cooperative: both share a tile, and the tensor cores wait for its epilogue, which for a sum into main_grad moves
// 128 KB a tile of this size and for a gelu takes thousands of instructions.)
using BlockTile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::_2, _1, _1>;
using Schedule = cutlass::epilogue::TmaWarpSpecialized;
using Accumulator = evt::Sm90AccFetch;
using Scalar = evt::Sm90ScalarBroadcast<float>;

template <template <class> class Function>
using Compute = evt::Sm90Compute<Function, float, float, fusion::kNearest>;

// A stride of cute in which the dimension with the given leading stride is the runtime one.
template <class S>
S stride_of(int64_t leading) {
  S stride = {};
  if constexpr (cute::is_integral<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>::value &&
                !cute::is_static<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>::value) {
    cute::get<0>(stride) = leading;
  } else {
    cute::get<1>(stride) = leading;
  }
  return stride;
}

// The source C of the epilogue, loaded only where `load` says so; AddIf does not look at it otherwise.
struct OptionalSource : evt::Sm90SrcFetch<float> {
  using Base = evt::Sm90SrcFetch<float>;
  struct SharedStorage {};
  struct Arguments {
    bool load = false;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE OptionalSource() {}
  CUTLASS_HOST_DEVICE OptionalSource(const Params& params, const SharedStorage&) : load(params.load) {}
  CUTLASS_DEVICE bool is_C_load_needed() const { return load; }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return load; }

  bool load = false;
};

template <Type T, Tile>
struct Product {
  using Element = typename fusion::ElementOf<T>::type;
  using Output = cute::conditional_t<kWeight, float, Element>;
  using Source = cute::conditional_t<kWeight, float, void>;
  using Descriptor = epi::detail::EpilogueDescriptor<BlockTile, epi::EpilogueTileAuto, Source, Output, Schedule>;
  static constexpr int kAccess = 16 / sizeof(Output);

  // The epilogue of each form: its visitor tree, whose result the collective stores, and the tree's arguments. (Out
  // delays a form that is not this object's.)
  template <Form F, class Out>
  struct Fusion;

  // act(store(accumulator + bias)), or with a gate act(gate) * store(accumulator + bias). The gate is read straight
  // into registers: shared memory for it would cost the main loop a stage whether there is a gate or not.
  template <class Out>
  struct Fusion<Form::forward, Out> {
    using Aux = epi::detail::AuxStoreDescriptor<Descriptor, Row, Out>;
    using Bias = evt::Sm90RowBroadcast<0, BlockTile, Out, float>;
    using Sum = evt::Sm90EVT<Compute<cutlass::plus>, Bias, Accumulator>;
    using Store = evt::Sm90AuxStore<Aux::Stages, typename Descriptor::EpilogueTile, Out, fusion::kNearest,
                                    typename Aux::Stride, typename Aux::SmemLayoutAtom, typename Aux::CopyOpR2S>;
    using Preact = evt::Sm90EVT<Store, Sum>;
    using Gate = evt::Sm90AuxLoad<0, void, Out, typename Aux::Stride, void, void>;
    using Tree = evt::Sm90EVT<Compute<fusion::Activate>, Scalar, Gate, Preact>;

    static typename Tree::Arguments arguments(const Gemm& g) {
      const typename Bias::Arguments bias = {static_cast<const Out*>(g.bias), Out(0), {}};
      const auto stride = stride_of<typename Aux::Stride>(g.n);
      const typename Scalar::Arguments act = {{fusion::choice_of(g)}, {nullptr}, {}};
      const typename Preact::Arguments preact = {{bias, {}, {}}, {static_cast<Out*>(g.preact), stride}};
      return {act, {static_cast<const Out*>(g.gate), Out(0), stride}, preact, {}};
    }
  };

  // the accumulator
  template <class Out>
  struct Fusion<Form::dx, Out> {
    using Tree =
        evt::Sm90EVT<evt::Sm90Compute<cutlass::epilogue::thread::Identity, Out, float, fusion::kNearest>, Accumulator>;

    static typename Tree::Arguments arguments(const Gemm&) { return {}; }
  };

  // add_if(accumulate, main_grad, inv_scale * flag(accumulator))
  template <class Out>
  struct Fusion<Form::dw, Out> {
    using Flag =
        evt::Sm90EVT<evt::Sm90ScalarReduction<fusion::AnyNonFinite, fusion::RaiseFlag, Out, Out, fusion::kNearest>,
                     Accumulator>;
    using Scaled = evt::Sm90EVT<Compute<cutlass::multiplies>, Scalar, Flag>;
    using Tree = evt::Sm90EVT<Compute<fusion::AddIf>, Scalar, OptionalSource, Scaled>;

    static typename Tree::Arguments arguments(const Gemm& g) {
      const typename Scalar::Arguments wanted = {{g.accumulate ? 1.0f : 0.0f}, {nullptr}, {}};
      const typename Scalar::Arguments inv_scale = {{0.0f}, {g.inv_scale}, {}};
      const typename Flag::Arguments flag = {{}, {g.found_inf, 0.0f, {}}};
      return {wanted, {g.accumulate}, {inv_scale, flag, {}}, {}};
    }
  };

  using Fused = Fusion<kForm, Output>;
  using Epilogue = typename epi::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile,
                                                   Cluster, epi::EpilogueTileAuto, float, float, Source, Row, kAccess,
                                                   Output, Row, kAccess, Schedule, typename Fused::Tree>::CollectiveOp;
  using Mainloop = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8, float, BlockTile,
      Cluster, gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Adapter = gemm::device::GemmUniversalAdapter<Kernel>;

  static constexpr int kBlockThreads = Kernel::MaxThreadsPerBlock, kBlockShared = Kernel::SharedStorageSize;

  static bool launch(const Gemm& g, int multiprocessors, cudaStream_t stream) {
    const int64_t lda = kWeight ? g.a.col : g.a.row;
    const int64_t ldb = kForm == Form::forward ? g.b.col : g.b.row;
    Output* out = static_cast<Output*>(kWeight ? static_cast<void*>(g.main_grad) : g.out);
    typename Adapter::Arguments arguments = {};
    arguments.mode = gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k), 1};
    arguments.mainloop = {static_cast<const Element*>(g.a.data), stride_of<typename Kernel::StrideA>(lda),
                          static_cast<const Element*>(g.b.data), stride_of<typename Kernel::StrideB>(ldb)};
    arguments.epilogue.thread = Fused::arguments(g);
    if constexpr (kWeight) {
      arguments.epilogue.ptr_C = out;
      arguments.epilogue.dC = stride_of<typename Kernel::StrideC>(g.n);
    }
    arguments.epilogue.ptr_D = out;
    arguments.epilogue.dD = stride_of<typename Kernel::StrideD>(g.n);
    arguments.hw_info.sm_count = multiprocessors;
    Adapter product;
    return Adapter::can_implement(arguments) == cutlass::Status::kSuccess &&
           product.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess &&
           product.run(stream) == cutlass::Status::kSuccess;
  }
};

}  // namespace

SPU_PRODUCT(fp16, large)
SPU_PRODUCT(bf16, large)

}  // namespace spu::cuda

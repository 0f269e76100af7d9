// What cublaslt.h declares, against the toolkit's own header, where the build has it. No code comes of it.
#include "cuda/cublaslt.h"

#if !defined(SPU_HOST_SIM) && defined(__has_include)
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

namespace spu::cuda {
namespace lt {

#define SPU_SAME(ours, theirs) static_assert(static_cast<long>(ours) == static_cast<long>(theirs), #theirs)
SPU_SAME(kSuccess, CUBLAS_STATUS_SUCCESS);
SPU_SAME(kNotSupported, CUBLAS_STATUS_NOT_SUPPORTED);
SPU_SAME(kFloat, CUDA_R_32F);
SPU_SAME(kHalf, CUDA_R_16F);
SPU_SAME(kBfloat16, CUDA_R_16BF);
SPU_SAME(kComputeFloat, CUBLAS_COMPUTE_32F);
SPU_SAME(kAsStored, CUBLAS_OP_N);
SPU_SAME(kTransposed, CUBLAS_OP_T);
SPU_SAME(kOnHost, CUBLASLT_POINTER_MODE_HOST);
SPU_SAME(kOnDevice, CUBLASLT_POINTER_MODE_DEVICE);
SPU_SAME(kPointerMode, CUBLASLT_MATMUL_DESC_POINTER_MODE);
SPU_SAME(kTransposeA, CUBLASLT_MATMUL_DESC_TRANSA);
SPU_SAME(kTransposeB, CUBLASLT_MATMUL_DESC_TRANSB);
SPU_SAME(kEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SPU_SAME(kBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SPU_SAME(kAuxPointer, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
SPU_SAME(kAuxStride, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
SPU_SAME(kPlain, CUBLASLT_EPILOGUE_DEFAULT);
SPU_SAME(kBias, CUBLASLT_EPILOGUE_BIAS);
SPU_SAME(kGelu, CUBLASLT_EPILOGUE_GELU);
SPU_SAME(kGeluBias, CUBLASLT_EPILOGUE_GELU_BIAS);
SPU_SAME(kGeluAux, CUBLASLT_EPILOGUE_GELU_AUX);
SPU_SAME(kGeluAuxBias, CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
SPU_SAME(kGeluGradient, CUBLASLT_EPILOGUE_DGELU);
SPU_SAME(kWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SPU_SAME(kReductionSchemes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
SPU_SAME(kAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SPU_SAME(kAlignmentA + 3, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
SPU_SAME(kReduceInFloat, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
SPU_SAME(sizeof(Algorithm), sizeof(cublasLtMatmulAlgo_t));
SPU_SAME(sizeof(Heuristic), sizeof(cublasLtMatmulHeuristicResult_t));
SPU_SAME(offsetof(Heuristic, workspace), offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
SPU_SAME(offsetof(Heuristic, state), offsetof(cublasLtMatmulHeuristicResult_t, state));
#undef SPU_SAME

}  // namespace lt
}  // namespace spu::cuda
#endif
#endif
